"""Resuming an online run: one file that is always whole."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rice_eval.errors import CheckpointError
from rice_eval.results.record import canonical_json

__all__ = ["Checkpoint"]

SAVE_EVERY_S = 60.0
"""Seconds between two saves: what a killed run loses at most."""


class Checkpoint:
    """A head's training state under a key.

    Args:
        folder: where it lives; None keeps nothing.
        facts: everything that decides the training; two runs share a file only if all of it agrees.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        self.key = hashlib.sha256(canonical_json(dict(facts)).encode()).hexdigest()[:16]
        self.path = folder / f"online-{self.key}.pt" if folder is not None else None
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state saved last, None where there is none.

        Raises:
            CheckpointError: a file that is not one of ours.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: can't be read ({error})", "delete it to start over") from error
        if not isinstance(state, dict) or state.get("key") != self.key:
            raise CheckpointError(f"{self.path}: belongs to another run", "delete it to start over")
        return state

    def save(self, state: Mapping[str, Any], force: bool = False) -> None:
        """Replace the file, at most once a minute unless ``force``: written beside it, synced, renamed."""
        if self.path is None or (not force and time.monotonic() - self._saved < SAVE_EVERY_S):
            return
        self._saved = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with part.open("wb") as handle:
                torch.save({"key": self.key, **state}, handle)
                handle.flush()
                os.fsync(handle.fileno())
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.path}: can't be written ({error.strerror})", "free some space, then run it again"
            ) from error
