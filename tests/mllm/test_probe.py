"""The perception probe: pooling, projector, schedule, resuming after a kill, what the record says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from rice_eval.errors import CheckpointError, DataError, PlanError
from rice_eval.mllm.bundle import load_bundle, read_manifest, seen_as
from rice_eval.mllm.lm_identity import lm_identity
from rice_eval.mllm.probe import PooledProjector, Schedule, load_projector, pool, projector_bytes, sha256_of
from rice_eval.protocols.base import configure
from rice_eval.protocols.perception import PerceptionProbe

WORKER = Path(__file__).with_name("probe_worker.py")


def test_pool_keeps_means_and_order():
    maps = torch.arange(36.0).reshape(6, 6)
    pooled = pool(maps.reshape(1, 36, 1), (6, 6), 2)[0, :, 0]
    assert pooled.tolist() == [maps[:3, :3].mean(), maps[:3, 3:].mean(), maps[3:, :3].mean(), maps[3:, 3:].mean()]
    tokens = torch.randn(2, 9, 4)
    assert pool(tokens, (3, 3), 3) is tokens


def test_pool_takes_grids_that_do_not_divide():
    tokens = torch.randn(1, 16 * 16, 3)
    maps = tokens.transpose(1, 2).reshape(1, 3, 16, 16)
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, 7).flatten(2).transpose(1, 2)
    assert torch.equal(pool(tokens, (16, 16), 7), expected)


def test_projector_standardises_and_speaks_at_the_size_of_words():
    projector = PooledProjector(5, 8, 2, 16, 3)
    rows = [torch.randn(4, 5) * torch.tensor([1.0, 10, 100, 0.1, 0]) + 3 for _ in range(20)]
    table = torch.randn(50, 8) * 0.2
    projector.start(rows, table.square().mean().sqrt(), table[[7, 9]])
    everything = torch.cat(rows)
    assert torch.allclose(projector.mean, everything.mean(0), atol=1e-3)
    assert torch.allclose(projector.scale[:4], 1 / everything.std(0, unbiased=False)[:4], rtol=1e-3)
    assert projector.scale[4] == 1  # a channel that never moves
    out = projector(everything[None], (8, 10))
    assert out.shape == (1, 4 + 3, 8)
    assert torch.allclose(out[:, :4].square().mean(-1).sqrt(), table.square().mean().sqrt().expand(1, 4), rtol=1e-3)
    assert torch.allclose(out[0, 4:], table[[7, 9, 7]])  # the prompt begins as words


def test_projector_needs_tokens():
    with pytest.raises(DataError, match="no training image"):
        PooledProjector(5, 8, 2, 16, 3).start([], torch.ones(()), torch.zeros(1, 8))


def test_projector_survives_its_file(tmp_path: Path):
    projector = PooledProjector(5, 8, 2, 16, 3, seed=3)
    (tmp_path / "p").write_bytes(projector_bytes(projector))
    told = {"width_in": 5, "width_out": 8, "side": 2, "hidden": 16, "prompt": 3}
    assert sha256_of(load_projector(tmp_path / "p", told)) == sha256_of(projector)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_projector(tmp_path / "p", {**told, "width_out": 9})
    (tmp_path / "p").write_bytes(projector_bytes(projector)[:-20])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_projector(tmp_path / "p", told)


def test_seed_draws_the_projector():
    assert sha256_of(PooledProjector(5, 8, 2, 16, 3, seed=1)) == sha256_of(PooledProjector(5, 8, 2, 16, 3, seed=1))
    assert sha256_of(PooledProjector(5, 8, 2, 16, 3, seed=1)) != sha256_of(PooledProjector(5, 8, 2, 16, 3, seed=2))


def test_schedule_walks_every_epoch_once():
    rates = Schedule(1e-3, 0.03, 0.0, 4, 2.0, 8, 0)
    steps = rates.steps(10)
    assert steps == 5
    told = [place for step in range(steps) for place in rates.batch_at(step, 10)]
    assert [epoch for epoch, _ in told] == [0] * 10 + [1] * 10
    walked = [k for _, k in told]
    assert sorted(walked[:10]) == sorted(walked[10:]) == list(range(10))
    assert walked[:10] != walked[10:]
    factors = [rates.factor(s, 100) for s in range(100)]
    assert factors[0] == pytest.approx(1 / 3)
    assert factors[2] == 1.0
    assert factors[-1] < 0.001
    assert all(a >= b for a, b in pairwise(factors[2:]))


@pytest.mark.parametrize(
    "change",
    [
        {"lm": "smollm"},
        {"blocks": 1},
        {"side": 8},
        {"hidden": 9},
        {"lr": 2e-3},
        {"weight_decay": 0.1},
        {"batch": 1},
        {"turns": 2},
        {"epochs": 3},
        {"prompt": 3},
        {"prompt_lr": 0.1},
        {"align_epochs": 0},
        {"align_lr": 2e-3},
        {"train_dtype": "bfloat16"},
        {"view": "square=112"},
    ],
    ids=str,
)
def test_every_field_is_in_the_hash(change: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rice_eval.protocols.perception.lm_identity", lambda name: name)
    plain = {"view": "square=224", "lm": "tiny-random", "train_dtype": "float32"}
    base = configure(PerceptionProbe, plain)
    assert configure(PerceptionProbe, {**plain, **change}).hash != base.hash
    assert base.settings()["tuned"] == ["projector"]
    assert base.settings()["lm_files"] == "tiny-random"


def test_fields_out_of_range_are_refused():
    for bad in (
        {"side": 0},
        {"side": 10**6},
        {"lr": -1.0},
        {"lr": float("inf")},
        {"prompt_lr": 1e38},
        {"prompt": -1},
        {"prompt": 10**12},
        {"hidden": 10**12},
        {"align_epochs": -1},
        {"weight_decay": float("nan")},
        {"epochs": float("inf")},
        {"batch": 10**12},
        {"train_dtype": "float16"},
    ):
        with pytest.raises(Exception, match="perception-probe"):
            configure(PerceptionProbe, {"view": "square=224", **bad})


def test_language_models_are_told_apart_by_their_files(tmp_path: Path):
    for name, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert lm_identity(str(tmp_path / "a")) != lm_identity(str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointError, match="no config.json"):
        lm_identity(str(tmp_path / "c"))


def _work(tmp_path: Path, name: str, *rest: str) -> subprocess.CompletedProcess[str]:
    folders = [str(tmp_path / name / "results"), str(tmp_path / name / "bank")]
    return subprocess.run(
        [sys.executable, str(WORKER), *folders, *rest], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )


def test_a_killed_training_ends_with_the_same_projector(tmp_path: Path):
    whole = _work(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr
    killed = _work(tmp_path, "killed", "kill", "3")
    assert killed.returncode == -signal.SIGKILL
    assert not list((tmp_path / "killed").rglob("perception-probe-*.json"))
    resumed = _work(tmp_path, "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 3" in resumed.stdout
    assert whole.stdout.split(" (")[0] == resumed.stdout.split(" (")[0]  # the projector's sha256
    a, b = (next((tmp_path / n).rglob("projector.safetensors")).read_bytes() for n in ("whole", "killed"))
    assert a == b
    records = [
        json.loads(next((tmp_path / n).rglob("perception-probe-*.json")).read_text()) for n in ("whole", "killed")
    ]
    assert records[0]["losses"] == records[1]["losses"]
    assert records[0]["metrics"] == records[1]["metrics"]
    _bundle_and_gate(next((tmp_path / "whole").rglob("perception-probe-*.json")))


def _bundle_and_gate(record: Path) -> None:
    """What a run leaves beside its record answers as it did, and records can be gated on a kind of question."""
    folder = record.with_suffix(".files")
    told = read_manifest(folder)
    assert told.tuned == ("projector",)
    mllm, _ = load_bundle(folder)
    from PIL import Image

    from rice_eval.datasets.scenes_vqa import ScenesVqa
    from rice_eval.mllm.judge import ask_all
    from rice_eval.mllm.vqa import asked

    val = ScenesVqa("val", 1)
    shown = seen_as(mllm, Image.fromarray(val.image(0)), told.stored)
    logged = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    before = [s["answer"] for s in logged if s["control"] == "" and s["image_id"] == "000000"]
    assert [s.answer for s in ask_all(mllm, asked(val), lambda index: shown)] == before
    manifest = yaml.safe_load((folder / "mllm.yaml").read_text())
    for change, match in (
        ({"lm_files": "0" * 16}, "language model 'tiny-random' is not the one of the training"),
        ({"format": 2}, "format"),
        ({"side": 0}, "side"),
        ({"prompt": -1}, "prompt"),
        ({"width_in": 10**12}, "width_in"),
        ({"stored": "fp12"}, "stored"),
        ({"tuned": []}, "tuned"),
    ):
        (folder / "mllm.yaml").write_text(yaml.safe_dump({**manifest, **change}))
        with pytest.raises(CheckpointError, match=match):
            load_bundle(folder)
    (folder / "mllm.yaml").write_text(yaml.safe_dump({**manifest, "encoder_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="is not the one of the training"):
        load_bundle(folder)


def test_a_projector_with_weights_that_are_not_finite_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rice_eval.run import evaluate

    step = torch.optim.AdamW.step

    def blown(self, *arguments, **named):
        step(self, *arguments, **named)
        self.param_groups[-1]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", blown)
    with pytest.raises(DataError, match="not finite"):
        evaluate(
            ["rgb-moments"],
            ["mllm/scenes-vqa"],
            settings={
                "lm": "tiny-random",
                "side": 3,
                "hidden": 16,
                "train_dtype": "float32",
                "align_epochs": 0,
                "epochs": 0.5,
            },
            results=tmp_path / "r",
            bank=tmp_path / "b",
            limit_train=8,
            limit_test=1,
        )
    assert not list((tmp_path / "r").rglob("perception-probe-*.json"))


def test_several_windows_are_refused(tmp_path: Path):
    from rice_eval.run import evaluate

    with pytest.raises(PlanError, match="several windows|slides"):
        evaluate(
            ["rgb-moments"],
            ["mllm/scenes-vqa"],
            settings={"lm": "tiny-random", "side": 3, "hidden": 16, "train_dtype": "float32"},
            view="short=224,crop=112,slide=112",
            results=tmp_path / "r",
            bank=tmp_path / "b",
            limit_train=2,
            limit_test=2,
        )
