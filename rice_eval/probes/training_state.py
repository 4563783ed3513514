"""Where a killed training goes on from: one file that is always whole."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rice_eval.errors import CheckpointError

__all__ = ["SAVE_EVERY_S", "TrainingState"]

SAVE_EVERY_S = 30.0
"""Seconds between two saves: what a killed run loses at most."""


class TrainingState:
    """What a training needs to go on, under a key.

    Args:
        folder: where the file lies; None keeps nothing.
        name: what the file is called before its key.
        facts: everything that decides the training, as plain JSON values; two runs share a file only if all of it agrees.
    """

    def __init__(self, folder: Path | None, name: str, facts: Mapping[str, Any]) -> None:
        self.key = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"{name}-{self.key}.pt" if folder is not None else None
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
        """Replace the file, at most every ``SAVE_EVERY_S`` seconds unless ``force``: written beside it, synced, renamed.

        Raises:
            CheckpointError: it can't be written.
        """
        if self.path is None or (not force and time.monotonic() - self._saved < SAVE_EVERY_S):
            return
        self._saved = time.monotonic()
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
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
