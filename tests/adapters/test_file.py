"""Users' own code as encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rice_eval.adapters import load_encoder
from rice_eval.errors import CardError, NotFoundError, UsageError

CODE = """
import torch
from torch import nn
import sibling

class Two(nn.Module):
    resolution = 64
    license = "MIT"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 5, 8, stride=8)
        self.b = nn.Conv2d(5, 7, 2, stride=2)
    def forward(self, x):
        x = self.a(x - sibling.MEAN)
        return {"eight": x, "sixteen": self.b(x)}

def two(): return Two()
def one():
    m = nn.Conv2d(3, 4, 16, stride=16)
    return m
def loaded(weights=None):
    m = Two()
    if weights is not None:
        m.load_state_dict(torch.load(weights, weights_only=True))
    return m
def floor():
    from rice_eval.adapters import load_encoder
    return load_encoder("rgb-moments")
def number(): return 7
def broken(): raise ValueError("no\\nluck")
def wrong_shape():
    return nn.Sequential(nn.Flatten())
def odd():
    return nn.Conv2d(3, 4, 10, stride=10)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "sibling.py").write_text("MEAN = 0.5\n")
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def test_a_module_of_several_maps(code: Path) -> None:
    encoder = load_encoder(f"file:{code}:two")
    facts = encoder.facts
    assert (facts.layers, facts.widths, facts.strides, facts.patch) == (2, (5, 7), (8, 16), 16)
    assert (facts.resolution, facts.license) == (64, "MIT")
    images = torch.rand(2, 3, 32, 48)
    tokens = encoder.encode(images, [1, 2])
    x = encoder.module.inner.a(images - 0.5)  # type: ignore[attr-defined]
    assert tokens.grids == {1: (4, 6), 2: (2, 3)}
    torch.testing.assert_close(tokens.patches[1], x.flatten(2).transpose(1, 2))
    assert load_encoder(f"file:{code}:two").fingerprint == encoder.fingerprint
    code.write_text(code.read_text().replace("stride=2)", "stride=2, bias=True)"))
    assert load_encoder(f"file:{code}:two").fingerprint != encoder.fingerprint


def test_weights_reach_the_factory(code: Path, tmp_path: Path) -> None:
    state = load_encoder(f"file:{code}:two").module.inner.state_dict()  # type: ignore[attr-defined]
    state["a.bias"] = state["a.bias"] + 1
    torch.save(state, tmp_path / "w.pt")
    encoder = load_encoder(f"file:{code}:loaded", weights=tmp_path / "w.pt")
    assert encoder.facts.source == "mine.py:loaded with w.pt"
    plain = load_encoder(f"file:{code}:loaded")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(encoder.encode(images, [1]).last, plain.encode(images, [1]).last + 1)
    with pytest.raises(UsageError, match="unexpected keyword") as caught:
        load_encoder(f"file:{code}:two", weights=tmp_path / "w.pt")
    assert "takes the keyword 'weights'" in caught.value.fix


def test_a_single_map_and_an_encoder(code: Path) -> None:
    assert load_encoder(f"file:{code}:one").encode(torch.rand(1, 3, 224, 112)).last.shape == (1, 98, 4)
    assert load_encoder(f"file:{code}:floor").name == "rgb-moments"


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("number", "gives a int"),
        ("broken", "raised ValueError: no luck"),
        ("wrong_shape", r"forward gives a tensor \(1, 150528\)"),
        ("odd", "map 1 is 22 x 22 for 224 x 224 px"),
    ],
)
def test_wrong_factories_end_in_one_line(code: Path, factory: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_encoder(f"file:{code}:{factory}")
    assert "\n" not in str(caught.value)


def test_wrong_references(code: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no function 'three'"):
        load_encoder(f"file:{code}:three")
    with pytest.raises(NotFoundError, match="no such file"):
        load_encoder(f"file:{tmp_path}/none.py:x")
    with pytest.raises(CardError, match=r"is not path\.py:factory"):
        load_encoder(f"file:{code}")
    code.write_text("def two(:\n")
    with pytest.raises(UsageError, match="SyntaxError"):
        load_encoder(f"file:{code}:two")
