"""``rice-eval mllm --model``: a checkpoint or a trained probe, judged here and by lmms-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_mllm import write

from rice_eval.cards import catalogue
from rice_eval.cli.main import main
from rice_eval.datasets import load_dataset
from rice_eval.datasets.subset import Subset
from rice_eval.errors import CheckpointError, UsageError
from rice_eval.mllm import checkpoints
from rice_eval.mllm.conversation import Request
from rice_eval.mllm.lmms import _read
from rice_eval.mllm.loaded import controls_of, load
from rice_eval.mllm.vqa import asked
from rice_eval.mllm_run import judge_model
from rice_eval.results.store import ResultStore


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "Tiny_LLaVA-NeXT"
    write(folder, "llava_next")
    return folder


def _samples(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (record.with_suffix(".files") / "samples.jsonl").read_text().splitlines()]


def test_a_llava_next_checkpoint_is_judged_here(llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", str(llava), "--judge", "rice-eval", "--limit-test", "2", "--results", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main(["mllm", *arguments, "--no-report", "--json"])
    assert end.value.code == 0
    told = json.loads(capsys.readouterr().out)
    record = ResultStore(tmp_path).load(Path(told["record"]))
    assert record.encoder.name == "tiny-llava-next-tower"
    assert record.encoder.source == "file Tiny_LLaVA-NeXT"
    assert record.protocol.id == "short-answers"
    assert record.protocol.settings["tuned"] == ["checkpoint"]
    assert record.judge is not None
    assert record.judge.name == "rice-eval"
    assert {"accuracy", "blind_accuracy"} < set(record.metrics)
    assert "mean_image_accuracy" not in record.metrics
    # Every question in order, with the answer that plain generation gives to its image, or to no image.
    card = catalogue().task("mllm/scenes-vqa")
    data = Subset(load_dataset(card.dataset, card.test, None, card.options), 2)
    questions = asked(data)
    model = checkpoints.load(llava)
    samples = _samples(Path(told["record"]))
    assert [s["control"] for s in samples] == [""] * len(questions) + ["blind"] * len(questions)
    for sample, q in zip(samples, questions + questions, strict=True):
        images = (Image.fromarray(data.image(q.index)),) if sample["control"] == "" else ()
        assert sample["id"] == q.id
        assert sample["answer"] == model.generate([Request(q.prompt, images)], 16)[0]


def test_a_trained_probe_is_judged_as_at_its_training(tmp_path: Path):
    from rice_eval.run import evaluate

    settings = {"lm": "tiny-random", "side": 3, "hidden": 16, "train_dtype": "float32", "epochs": 0.5}
    where = {"limit_train": 8, "limit_test": 2, "bank": tmp_path / "bank", "resamples": 100}
    trained = evaluate(["rgb-moments"], ["mllm/scenes-vqa"], settings=settings, results=tmp_path / "one", **where)[0]
    folder = trained.path.with_suffix(".files")
    judged = judge_model(str(folder), ["mllm/scenes-vqa"], judge="rice-eval", results=tmp_path / "two", limit=2)[0]
    assert _samples(judged.path) == _samples(trained.path)
    assert {s["control"] for s in _samples(judged.path)} == {"", "blind", "mean_image"}
    assert judged.record.encoder.name == "rgb-moments"
    assert judged.record.encoder.sha256 == trained.record.encoder.sha256
    assert judged.record.view == "square=224"
    assert {k: m.value for k, m in judged.record.metrics.items()} == {
        k: m.value for k, m in trained.record.metrics.items()
    }


def test_controls_are_those_a_model_can_be_put_to(llava: Path, tmp_path: Path):
    assert controls_of(llava) == ("", "blind")
    (tmp_path / "mllm.yaml").write_text("format: 1\n")
    assert controls_of(tmp_path) == ("", "blind", "mean_image")
    with pytest.raises(CheckpointError, match=r"mllm\.yaml"):
        load(tmp_path)


def test_the_towers_fingerprint_is_not_of_its_name(llava: Path, tmp_path: Path):
    other = tmp_path / "copy"
    other.symlink_to(llava, target_is_directory=True)
    assert load(llava).mllm.encoder.facts.sha256 == load(other).mllm.encoder.facts.sha256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lm", "tiny-random"], "--lm says how a projector is trained"),
        (["--set", "side=3"], "--set says how a projector is trained"),
        (["--limit-train", "3"], "--limit-train says how"),
        (["--judge", "rice-eval", "--processes", "2"], "--processes 2 are lmms-eval's"),
        (["--judge", "rice-eval", "--task", "docvqa"], "is a benchmark of lmms-eval"),
        (["--judge", "both"], "--judge both is not known"),
        (["--judge", "rice-eval", "--dtype", "int4"], "choose float32, bfloat16, float16"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: list[str], said: str, llava: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        main(["mllm", "--model", str(llava), *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_processes_are_for_models(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["mllm", "-e", "rgb-moments", "--processes", "2"])
    assert end.value.code == 2
    assert "--processes is for judging with --model" in capsys.readouterr().err


def test_a_tasks_hash_is_the_same_in_every_process(tmp_path: Path):
    """lmms-eval prints functions with their places in memory, which differ from run to run."""
    hashes = []
    for place, post in (("0x7f2c50c53d80", "a"), ("0x7f0000000010", "a"), ("0x7f0000000010", "b")):
        folder = tmp_path / f"{place}{post}"
        folder.mkdir()
        config = {"doc_to_text": f"<function doc_to_text at {place}>", "post_prompt": post}
        told = {"configs": {"toy": config}, "results": {"toy": {"accuracy,none": 0.5}}, "versions": {"toy": 1}}
        (folder / "x_results.json").write_text(json.dumps(told))
        (folder / "x_samples_toy.jsonl").write_text('{"doc_id": 0, "filtered_resps": ["yes"], "target": "yes"}\n')
        done = subprocess.CompletedProcess[str]([], 0, "", "")
        hashes.append(_read(folder, "toy", "0.7.3", done).task_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_model_too_large_is_refused_before_it_is_read(
    llava: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from rice_eval.adapters.checkpoints import Checkpoint
    from rice_eval.mllm import memory

    monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000)
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as end:
        main(["mllm", "--model", str(llava), "--judge", "rice-eval"])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "GiB in float32" in error
    assert "--dtype" in error
    assert "\n" not in error


def test_the_language_models_type_separates_records(llava: Path, tmp_path: Path):
    keys = set()
    for dtype in ("float32", "bfloat16"):
        where = {"judge": "rice-eval", "results": tmp_path / dtype, "limit": 1, "dtype": dtype}
        record = judge_model(str(llava), ["mllm/scenes-vqa"], **where)[0].record
        assert record.protocol.settings["dtype"] == dtype
        keys.add(record.comparability_key)
    assert len(keys) == 2


def test_model_of_no_folder_is_refused_before_any_judge(tmp_path: Path):
    with pytest.raises(UsageError, match="no such folder"):
        judge_model(str(tmp_path / "x"), ["mllm/scenes-vqa"], judge="rice-eval", results=tmp_path)
    with pytest.raises(CheckpointError, match="holds no model"):
        judge_model(str(tmp_path), ["mllm/scenes-vqa"], judge="rice-eval", results=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_lmms_eval_answers_as_this_package_on_any_number_of_processes(llava: Path, tmp_path: Path, processes: int):
    python = Path(os.environ.get("RICE_EVAL_LMMS_PYTHON", sys.executable))
    if subprocess.run([str(python), "-c", "import lmms_eval.evaluator"], capture_output=True).returncode:
        pytest.skip("lmms-eval is not installed (RICE_EVAL_LMMS_PYTHON names an environment that has it)")
    task = ["mllm/scenes-vqa"]
    ours = judge_model(str(llava), task, judge="rice-eval", results=tmp_path / "ours", limit=3)[0]
    theirs = judge_model(
        str(llava), task, lmms_python=python, results=tmp_path / "theirs", limit=3, processes=processes
    )[0]
    assert _samples(ours.path) == _samples(theirs.path)
    assert ours.record.metrics == theirs.record.metrics
    assert ours.record.comparability_key == theirs.record.comparability_key
    assert ours.record.chosen == theirs.record.chosen
    assert theirs.record.judge is not None
    assert theirs.record.judge.name == "lmms-eval"
