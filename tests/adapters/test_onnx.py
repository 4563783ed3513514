"""ONNX files as encoders, against onnxruntime's own output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import LoadRequest
from rice_eval.adapters.onnx import adapter
from rice_eval.cards import EncoderCard, FamilyCard, SourceCard
from rice_eval.errors import CardError, CheckpointError, NotFoundError, PlanError

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def _export(path: Path, *, dynamic: bool = True, tokens: bool = False, scale: float = 1.0) -> Path:
    """A small network by hand: 8 px patches to a map of 6, a map of 4 at stride 16, or tokens with two in front."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng.standard_normal((6, 3, 8, 8), dtype=np.float32) * scale,
        "w2": rng.standard_normal((4, 6, 2, 2), dtype=np.float32),
        "front": rng.standard_normal((1, 2, 6), dtype=np.float32),
        "shape": np.array([0, 6, -1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["eight"], strides=[8, 8], kernel_shape=[8, 8]),
        helper.make_node("Conv", ["eight", "w2"], ["sixteen"], strides=[2, 2], kernel_shape=[2, 2]),
        helper.make_node("GlobalAveragePool", ["sixteen"], ["pooled"]),
        helper.make_node("Reshape", ["eight", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["patches"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["front", "patches"], ["tokens"], axis=1),
    ]
    names = ["tokens"] if tokens else ["eight", "sixteen", "pooled"]
    nodes = nodes if tokens else nodes[:3]
    sides: list[Any] = ["B", 3, "H", "W"] if dynamic else [1, 3, 32, 32]
    if tokens:
        sides[0] = 1
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def _card(path: Path, **fields: Any) -> LoadRequest:
    values = {"patch": 16, "resolution": 64, "arch": "x", "mean": (0.0,) * 3, "std": (1.0,) * 3, **fields}
    card = EncoderCard(name="mine", source=SourceCard(file=str(path)), **values)
    return LoadRequest(card, FamilyCard(family="f", title="f", adapter="onnx", encoders=(card,)))


def test_maps_are_the_files_outputs(tmp_path: Path) -> None:
    path = _export(tmp_path / "m.onnx")
    encoder = adapter(_card(path))
    facts = encoder.facts
    assert (facts.layers, facts.widths, facts.strides, facts.patch) == (2, (6, 4), (8, 16), 16)
    assert "outputs left out: pooled [1, 4, 1, 1]" in facts.notes
    images = torch.rand(3, 3, 32, 48)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run(["eight", "sixteen"], {"image": images.numpy()})
    tokens = encoder.encode(images, [1, 2])
    assert tokens.grids == {1: (4, 6), 2: (2, 3)}
    for layer in (1, 2):
        assert np.array_equal(
            tokens.patches[layer].numpy(),
            expected[layer - 1].reshape(3, -1, tokens.grids[layer][0] * tokens.grids[layer][1]).transpose(0, 2, 1),
        )


def test_tokens_with_a_prefix_one_image_at_a_time(tmp_path: Path) -> None:
    path = _export(tmp_path / "t.onnx", tokens=True)
    encoder = load_encoder(f"onnx:{path}")
    assert encoder.facts.resolution == 224
    assert (encoder.facts.patch, encoder.facts.widths) == (8, (6,))
    assert "no mean and std stated: ImageNet's taken" in encoder.facts.notes
    images = torch.rand(2, 3, 32, 64)
    tokens = encoder.encode(images)
    assert tokens.last.shape == (2, 32, 6)
    assert tokens.cls is not None
    assert tokens.registers is not None
    assert tokens.registers.shape == (2, 1, 6)
    alone = encoder.encode(images[1:])
    assert torch.equal(alone.last[0], tokens.last[1])


def test_a_file_of_one_size(tmp_path: Path) -> None:
    encoder = load_encoder(f"onnx:{_export(tmp_path / 'm.onnx', dynamic=False)}")
    assert encoder.facts.resolution == 32
    assert encoder.encode(torch.rand(2, 3, 32, 32), [2]).last.shape == (2, 4, 4)
    with pytest.raises(PlanError, match="exported for 32 x 32 px"):
        encoder.encode(torch.rand(1, 3, 64, 64))


def test_the_fingerprint_is_of_weights_and_graph(tmp_path: Path) -> None:
    prints = {
        load_encoder(f"onnx:{_export(tmp_path / 'a.onnx')}").fingerprint,
        load_encoder(f"onnx:{_export(tmp_path / 'b.onnx', scale=2)}").fingerprint,
        load_encoder(f"onnx:{_export(tmp_path / 'c.onnx', tokens=True)}").fingerprint,
    }
    assert len(prints) == 3
    assert load_encoder(f"onnx:{_export(tmp_path / 'd.onnx')}").fingerprint in prints


def test_what_a_card_can_say(tmp_path: Path) -> None:
    path = _export(tmp_path / "m.onnx")
    assert adapter(_card(path, options={"outputs": ["sixteen"]})).facts.widths == (4,)
    for fields, words in (
        ({"options": {"outputs": ["x"]}}, "has no output 'x'"),
        ({"options": {"layer": 1}}, "no option 'layer'"),
        ({"patch": 14}, "the card says patch 14, the file has 16"),
    ):
        with pytest.raises(CardError, match=words):
            adapter(_card(path, **fields))
    with pytest.raises(CheckpointError, match="no map"):
        adapter(_card(path, options={"outputs": ["pooled"]}))


def test_files_that_can_not_be_taken(tmp_path: Path) -> None:
    path = _export(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="no readable ONNX file") as caught:
        load_encoder(f"onnx:{path}")
    assert "\n" not in str(caught.value)
    with pytest.raises(NotFoundError, match="no such file"):
        load_encoder(f"onnx:{tmp_path}/none.onnx")
