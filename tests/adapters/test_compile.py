"""``Encoder.compile``: what is compiled, what is said, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import COMPILED
from rice_eval.errors import PlanError, UsageError

T = pytest.importorskip("transformers")
from rice_layouts import TINY  # noqa: E402
from tiny_models import images, randomise  # noqa: E402

NAME = "rice-vit-l-14-560"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rice")
    randomise(T.MLCDVisionModel(T.MLCDVisionConfig(**TINY))).save_pretrained(out)  # type: ignore[operator]
    return out


def test_blocks_are_compiled_and_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            ran.append(function)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    encoder = load_encoder(NAME, weights=folder)
    x = images(42, 28)
    before, fingerprint, flops = encoder.encode(x, layers=(1, 3)), encoder.fingerprint, encoder.flops(28, 28)
    encoder.compile()
    ran.clear()
    after = encoder.encode(x, layers=(1, 3))
    assert len(ran) == 3
    assert all(torch.equal(after.patches[n], before.patches[n]) for n in (1, 3))
    assert COMPILED in encoder.facts.notes
    assert encoder.fingerprint == fingerprint
    assert encoder.flops(28, 28) == flops  # counted on the blocks as written: compiled kernels are not counted
    assert len(ran) == 3


@pytest.mark.parametrize(("name", "count"), [("vit_tiny_patch16_224", 12), ("resnet18", 8), ("convnext_atto", 4)])
def test_timm_models_are_compiled_block_by_block(name: str, count: int, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "m.pt")
    assert len(load_encoder(f"timm:{name}", weights=tmp_path / "m.pt")._compilable()) == count


def test_what_can_not_be_compiled_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="can't be compiled"):
        load_encoder("rgb-moments").compile()

    def broken(*_args: Any) -> None:
        raise RuntimeError("no C++ compiler\nlong text")

    monkeypatch.setattr(torch, "compile", broken)
    encoder = load_encoder(NAME, weights=folder)
    with pytest.raises(UsageError, match=r"does not work here \(RuntimeError: no C\+\+ compiler\)"):
        encoder.compile()
    assert COMPILED not in encoder.facts.notes


def test_the_banks_key_tells_compiled_from_not() -> None:
    from rice_eval.bank.key import COMPUTES

    assert {c for c in COMPUTES if c.endswith("+compile")} == {c + "+compile" for c in ("weights", "bf16", "fp16")}


@pytest.mark.slow
def test_compiled_tokens_are_the_same_to_the_last_digits(folder: Path) -> None:
    encoder, compiled = load_encoder(NAME, weights=folder), load_encoder(NAME, weights=folder)
    compiled.compile()
    assert isinstance(compiled._model, nn.Module)  # type: ignore[attr-defined]
    for size in ((28, 28), (42, 70)):
        x = images(*size)
        a, b = encoder.encode(x, layers=(1, 2, 3)), compiled.encode(x, layers=(1, 2, 3))
        for n in (1, 2, 3):
            torch.testing.assert_close(a.patches[n], b.patches[n], atol=1e-4, rtol=1e-4)
