"""Answers, statistics, and lmms-eval as the judge."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rice_eval.adapters import load_encoder
from rice_eval.errors import DataError, MissingExtraError, PlanError, UsageError
from rice_eval.mllm.answer import answer, groups
from rice_eval.mllm.bundle import assemble
from rice_eval.mllm.conversation import Encoded, Request
from rice_eval.mllm.judge import Sample, prompts_sha256, samples_text, statistics_of
from rice_eval.mllm.lm import tiny_random
from rice_eval.mllm.lmms import check_online, lmms_version, python_for
from rice_eval.mllm.model import Mllm
from rice_eval.mllm.probe import PooledProjector


@pytest.fixture(scope="module")
def mllm() -> Mllm:
    encoder = load_encoder("rgb-moments")
    width = encoder.facts.widths[-1]
    projector = PooledProjector(width, 64, 3, 16, 2)
    return assemble(encoder, tiny_random(), projector, (encoder.facts.layers,), True, "square=56")


def _requests(mllm: Mllm) -> list[Request]:
    draw = np.random.default_rng(0)
    out = []
    for n in range(3):
        image = Image.fromarray(draw.integers(0, 255, (40, 60, 3), dtype=np.uint8))
        seen = mllm.encode([image])[0]
        for question in ("What is this?", "Is there a bird in the image?", "How many?")[: n + 1]:
            out.append(Request(question, (seen,), "Look."))
    return [*out, Request("Without an image?", (), "Look."), Request("What?", (), "Look.")]


def test_answers_are_those_of_generate(mllm: Mllm):
    requests = _requests(mllm)
    assert answer(mllm, requests, 12) == mllm.generate(requests, 12)


def test_equal_requests_are_answered_once(mllm: Mllm, monkeypatch: pytest.MonkeyPatch):
    requests = [Request("Same?", (), "Look.")] * 5 + [Request("Other?", (), "Look.")]
    counted = []
    real = mllm.lm.model.forward
    monkeypatch.setattr(
        mllm.lm.model, "forward", lambda *a, **k: (counted.append(len(k["inputs_embeds"])), real(*a, **k))[1]
    )
    said = answer(mllm, requests, 1)
    assert len(set(said[:5])) == 1
    assert max(counted) == 2


def test_groups_hold_one_image(mllm: Mllm):
    one, two = Encoded(torch.zeros(9, 4), (3, 3)), Encoded(torch.zeros(9, 4), (3, 3))
    requests = [Request("a", (one,)), Request("b", (one,)), Request("a", (two,)), Request("c"), Request("d")]
    assert groups(requests) == [[0, 1], [2], [3, 4]]
    assert [len(g) for g in groups([Request("q", (one,))] * 20, limit=16)] == [16, 4]


def _sample(image: str, kind: str, right: bool, k: int = 0) -> Sample:
    return Sample(f"{image}-{kind}-{k}", image, kind, "?", "yes", "yes" if right else "no")


def test_statistics_count_questions_by_image():
    seen = [_sample("a", "colour", True), _sample("a", "presence", False), _sample("b", "presence", True)]
    blind = [_sample("a", "colour", False), _sample("a", "presence", False), _sample("b", "presence", True)]
    found = statistics_of({"": seen, "blind": blind}, ["a", "b"])
    point = found.point()
    assert point["accuracy"] == pytest.approx(200 / 3)
    assert point["accuracy_presence"] == pytest.approx(50)
    assert point["blind_accuracy"] == pytest.approx(100 / 3)
    assert found.denominators[:, 0].tolist() == [2, 1]


def test_controls_must_answer_the_same_questions():
    with pytest.raises(DataError, match="other questions"):
        statistics_of({"": [_sample("a", "colour", True)], "blind": [_sample("b", "colour", True)]}, ["a", "b"])


def test_prompts_hash_knows_order_and_words():
    a, b = _sample("a", "colour", True), _sample("b", "colour", True)
    assert prompts_sha256([a, b]) != prompts_sha256([b, a])
    assert prompts_sha256([a]) == prompts_sha256([Sample(a.id, a.image_id, a.kind, a.prompt, a.truth, "else")])
    assert samples_text({"": [a], "blind": [a]}).count("\n") == 2


def test_a_task_from_the_network_is_refused_offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PlanError, match="HF_HUB_OFFLINE switches the hub off"):
        check_online("mllm/docvqa", True)
    check_online("mllm/scenes-vqa", False)


def test_lmms_eval_absent_is_one_line(tmp_path: Path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(MissingExtraError, match="not installed"):
        python_for(bare)
    with pytest.raises(MissingExtraError, match="can't be run"):
        lmms_version(tmp_path / "none")


def test_model_of_no_folder(tmp_path: Path):
    from rice_eval.mllm_run import judge_model

    with pytest.raises(UsageError, match="no such folder"):
        judge_model(str(tmp_path / "x"), ["mllm/scenes-vqa"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-e", "rgb-moments", "--recipe", "perception"], "did you mean 'perception-probe'"),
        (["-e", "rgb-moments", "--recipe", "llava-next"], "--model FOLDER"),
        (["-e", "rgb-moments", "--task", "docvqa"], "has no training split"),
        (["-e", "rgb-moments", "--task", "segmentation/scenes"], "is of kind segmentation"),
        (["-e", "rgb-moments", "--lm", "no/such", "--judge", "rice-eval"], "neither in the hub's cache"),
        (["--task", "scenes-vqa"], "no encoder is given"),
        (["--model", "x", "-e", "rgb-moments"], "takes no --encoder"),
        (["--model", ".", "--task", "flickr30k-entities"], "lmms-eval has no task"),
        (["--model", ".", "--task", "docvqa"], "HF_HUB_OFFLINE"),
    ],
)
def test_command_line_errors_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from rice_eval.cli.main import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        main(["mllm", *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_task_is_written_for_lmms_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from rice_eval.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["mllm", "task", "--out", str(tmp_path / "t"), "--limit", "2"])
    assert end.value.code == 0
    assert "--tasks scenes_vqa --include_path" in capsys.readouterr().out
    assert (tmp_path / "t" / "scenes_vqa.yaml").is_file()


def _lmms_python() -> Path | None:
    """An interpreter with lmms-eval: $RICE_EVAL_LMMS_PYTHON, else this one."""
    chosen = Path(os.environ.get("RICE_EVAL_LMMS_PYTHON", sys.executable))
    done = subprocess.run([str(chosen), "-c", "import lmms_eval.evaluator"], capture_output=True)
    return chosen if done.returncode == 0 else None


@pytest.mark.slow
def test_lmms_eval_scores_sample_by_sample_as_this_package(tmp_path: Path):
    python = _lmms_python()
    if python is None:
        pytest.skip("lmms-eval is not installed (RICE_EVAL_LMMS_PYTHON names an environment that has it)")
    import json

    from rice_eval.run import evaluate

    settings = {"lm": "tiny-random", "side": 3, "hidden": 16, "train_dtype": "float32", "epochs": 0.5}
    where = {"settings": settings, "limit_train": 8, "limit_test": 4, "bank": tmp_path / "bank", "resamples": 100}
    ours = evaluate(["rgb-moments"], ["mllm/scenes-vqa"], results=tmp_path / "ours", **where)[0]
    theirs = evaluate(["rgb-moments"], ["mllm/scenes-vqa"], results=tmp_path / "theirs", lmms_python=python, **where)[0]
    logs = [
        [json.loads(line) for line in (r.path.with_suffix(".files") / "samples.jsonl").read_text().splitlines()]
        for r in (ours, theirs)
    ]
    assert logs[0] == logs[1]
    assert ours.record.metrics == theirs.record.metrics
    assert ours.record.comparability_key == theirs.record.comparability_key
    assert theirs.record.judge is not None
    assert theirs.record.judge.name == "lmms-eval"
    assert ours.record.judge is not None
    assert ours.record.judge.prompts_sha256 == theirs.record.judge.prompts_sha256
