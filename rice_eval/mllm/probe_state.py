"""Where a killed training of a projector goes on from: one file that is always whole."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rice_eval.errors import CheckpointError
from rice_eval.results.record import canonical_json

__all__ = ["SAVE_EVERY_S", "ProbeState"]

SAVE_EVERY_S = 30.0
"""Seconds between two saves: what a killed run loses at most."""

Curve = list[tuple[float, float]]


class ProbeState:
    """A projector's training state under a key.

    Args:
        folder: where it lives; None keeps nothing.
        facts: everything that decides the training; two runs share a file only if all of it agrees.
        every: seconds between two saves.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any], every: float = SAVE_EVERY_S) -> None:
        self.key = hashlib.sha256(canonical_json(dict(facts)).encode()).hexdigest()[:16]
        self.path = folder / f"projector-{self.key}.pt" if folder is not None else None
        self._every, self._saved = every, time.monotonic()

    def restore(self, projector: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, Curve, list[float]]:
        """Put the saved state into both; returns the step to go on from, the curve so far, and the losses of its open window.

        Raises:
            CheckpointError: a file that is not one of ours.
        """
        if self.path is None or not self.path.exists():
            return 0, [], []
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: can't be read ({error})", "delete it to start over") from error
        if not isinstance(state, dict) or state.get("key") != self.key:
            raise CheckpointError(f"{self.path}: belongs to another run", "delete it to start over")
        projector.load_state_dict(state["projector"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"]), [(float(a), float(b)) for a, b in state["curve"]], list(state["pending"])

    def save(
        self,
        step: int,
        projector: nn.Module,
        optimizer: torch.optim.Optimizer,
        curve: Curve,
        pending: list[float],
        force: bool = False,
    ) -> None:
        """Replace the file, at most every ``every`` seconds unless ``force``: written beside it, synced, renamed.

        Raises:
            CheckpointError: it can't be written.
        """
        if self.path is None or (not force and time.monotonic() - self._saved < self._every):
            return
        self._saved = time.monotonic()
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        content = {
            "key": self.key,
            "step": step,
            "projector": projector.state_dict(),
            "optimizer": optimizer.state_dict(),
            "curve": [list(point) for point in curve],
            "pending": pending,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as handle:
                torch.save(content, handle)
                handle.flush()
                os.fsync(handle.fileno())
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.path}: can't be written ({error.strerror})", "free some space, then run it again"
            ) from error
