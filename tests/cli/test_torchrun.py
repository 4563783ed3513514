"""The command line under ``torchrun``: the first process writes and prints, the others help and stay silent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
RICE_EVAL = [sys.executable, "-m", "rice_eval.cli.main", "segmentation", "-e", "rgb-moments"]
DATA = ["--option", "n_train=8", "--option", "n_val=4", "--option", "size=64"]
ONLINE = [
    "--view", "square=56", "--set", "steps=4", "--set", "batch=4", "--set", "warmup=1", "--set", "side=56", "--set", "crop=56",
]  # fmt: skip


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    where = ["--results", str(folder / "results"), "--bank", str(folder / "bank")]
    return subprocess.run(
        [*command, *where], capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )  # fmt: skip


def records(folder: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((folder / "results").rglob("*.json"))]


@pytest.mark.slow
def test_two_processes_write_one_record_and_agree_with_one(tmp_path: Path):
    arguments = ["-p", "dinov2-linear", *DATA, *ONLINE, "--json"]
    together = run([*TORCHRUN, *RICE_EVAL, *arguments], tmp_path / "two")
    assert together.returncode == 0, together.stderr[-3000:]
    alone = run([*RICE_EVAL, *arguments], tmp_path / "one")
    assert alone.returncode == 0, alone.stderr[-3000:]
    lines = [line for line in together.stdout.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    printed = json.loads(lines[0])
    (two,), (one,) = records(tmp_path / "two"), records(tmp_path / "one")
    assert printed["metrics"]["miou"]["value"] == two["metrics"]["miou"]["value"]
    assert two["protocol"] == one["protocol"]
    assert two["cost"]["forwards"] == one["cost"]["forwards"] == 4 * 4 + 4
    assert two["warnings"][0] == "2 processes shared the work"
    assert abs(two["metrics"]["miou"]["value"] - one["metrics"]["miou"]["value"]) < 1.0  # sums in another order


@pytest.mark.slow
def test_a_protocol_on_the_bank_runs_once(tmp_path: Path):
    done = run([*TORCHRUN, *RICE_EVAL, "-p", "gram-lda", *DATA, "--view", "square=56", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(records(tmp_path)) == 1
    assert records(tmp_path)[0]["cost"]["forwards"] == 12


@pytest.mark.slow
def test_an_error_is_told_once(tmp_path: Path):
    done = run([*TORCHRUN, *RICE_EVAL, "-p", "dinov2-linear", *DATA, *ONLINE, "--set", "tokens=fp16"], tmp_path)
    assert done.returncode != 0
    assert [line.startswith("error: protocol 'dinov2-linear'") for line in done.stderr.splitlines()].count(True) == 1
    assert not done.stdout
    assert not list(tmp_path.rglob("*.json"))
    shared = run([*TORCHRUN, *RICE_EVAL, "-p", "dinov2-linear", *DATA, *ONLINE, "--set", "batch=3"], tmp_path)
    assert "a batch of 3 does not split over 2 processes" in shared.stderr
    ray = run([*TORCHRUN, *RICE_EVAL, "-p", "gram-lda", *DATA, "--executor", "ray"], tmp_path)
    assert "torchrun and --executor ray both start processes" in ray.stderr
