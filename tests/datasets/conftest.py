"""Tiny copies of real layouts, written by the tests themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def _real(name: str, what: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{what} are not beside the repository (../shared/data/{name})")
    return folder


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    return _real("coco-mini", "the real COCO photos")


@pytest.fixture(scope="session")
def receipts() -> Path:
    return _real("receipts", "the real receipts")
