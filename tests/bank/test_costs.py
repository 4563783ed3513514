"""Operations of a forward are counted once a bank, and a damaged or unwritable file costs a count, not a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rice_eval.bank import costs
from rice_eval.bank.costs import FLOPS, counted_once


def test_counted_once_an_encoder_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter((10, None, 30, 40, 50))

    def found(encoder: str, *size: int) -> int | None:
        return counted_once(tmp_path / "bank", encoder, (size[0], size[1]), lambda: next(counts))

    assert [found("a", 14, 28) for _ in range(2)] == [10, 10]
    assert [found("a", 28, 14) for _ in range(2)] == [None, None]  # can't be counted: not tried again
    assert found("b", 14, 28) == 30
    monkeypatch.setattr(costs, "__version__", "9")
    assert found("a", 14, 28) == 40
    (tmp_path / "bank" / FLOPS).write_text('{"a": "lots"')
    assert found("a", 14, 28) == 50
    assert (tmp_path / "bank" / FLOPS).read_text().count("14x28") == 1


def test_a_bank_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(costs, "write_atomic", refuse)
    assert counted_once(tmp_path, "a", (1, 1), lambda: 7) == 7
