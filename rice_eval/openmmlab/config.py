"""A config of an engine that is not ours as a protocol: what its hash covers, and how our backbone stands in it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from rice_eval.protocols.base import Context, Outcome, Protocol

__all__ = ["EngineConfig", "backbone_config", "config_hash"]

_MACHINE = ("work_dir", "data_root", "launcher", "log_level", "resume", "randomness", "load_from")
"""Top-level values that say where a run happens, not what it measures. Seed and weights are fields of their own."""


@dataclass(frozen=True)
class EngineConfig(Protocol):
    """An engine's config as a protocol: everything in it, and the engine's version, is in the hash.

    Attributes:
        config: sha256 of the config as run, see ``config_hash``.
        engine: name and version.
        trained: whether the run trained, or tested weights it was given.
        weights: sha256 of ``load_from``'s file; empty without one.
    """

    view: str = "config"
    tokens: str = "online"
    config: str = ""
    engine: str = ""
    trained: bool = True
    weights: str = ""

    def run(self, context: Context) -> Outcome:
        """Not run on the bank: ``Engine.evaluate`` runs it."""
        raise NotImplementedError("use evaluate_config or evaluate_detection")


def backbone_config(model: Any, kind: str, name: str, weights: Path | None, **more: Any) -> dict[str, Any]:
    """Our backbone ``kind`` around an encoder, as a config writes it, with the normalisation of the model's preprocessor."""
    normalised = model.get("data_preprocessor") or {}
    statistics = {k: list(normalised[k]) for k in ("mean", "std") if normalised.get(k) is not None}
    checkpoint = {} if weights is None else {"weights": str(weights)}
    return {"type": f"rice_eval.{kind}", "name": name, **checkpoint, **statistics, **more}


def config_hash(config: Config, folders: Mapping[str, str], blank: Callable[[Any], None]) -> str:
    """sha256 of a config's values without machine, paths, encoder and what follows from the encoder's width.

    Two encoders under one config share a protocol, so they are ranked.

    Args:
        config: as run.
        folders: what stands for a path -> the path.
        blank: see ``Engine``.
    """
    config = copy.deepcopy(config)
    for name in _MACHINE:
        config.pop(name, None)
    for name in ("name", "weights"):
        config.model.backbone.pop(name, None)
    blank(config.model)
    plain = json.dumps(config.to_dict(), sort_keys=True, default=repr)  # no layout, which depends on the paths' lengths
    for name, path in sorted(folders.items(), key=lambda item: -len(item[1])):
        plain = plain.replace(path, name) if path else plain
    return hashlib.sha256(plain.encode()).hexdigest()
