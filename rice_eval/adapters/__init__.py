"""Encoders: one contract, one module a family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rice_eval.cards import catalogue
from rice_eval.errors import UsageError
from rice_eval.registry import adapters

if TYPE_CHECKING:
    from rice_eval.adapters.base import Adapter, Encoder

__all__ = ["load_encoder"]


def load_encoder(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str = "cpu",
    include: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> Encoder:
    """Load an encoder by its registry name, or by ``file:path.py:factory`` / ``onnx:path.onnx`` / ``timm:name``.

    Args:
        name: a name from ``rice-eval list encoders``, or ``ADAPTER:REFERENCE`` for an encoder without a card.
        weights: a checkpoint (file or folder) that replaces the card's source.
        device: a torch device.
        include: folders with more cards.
        trust_remote_code: let code shipped with a checkpoint run.

    Raises:
        NotFoundError: no such encoder.
        CheckpointError: weights that are missing, damaged or of another architecture.
    """
    import torch

    from rice_eval.adapters.base import LoadRequest
    from rice_eval.adapters.uncarded import card_for

    cards = catalogue(tuple(Path(p) for p in include))
    if name not in cards.encoders and ":" in name:
        family, card = card_for(name)
    else:
        family, card = cards.encoder(name)
    adapter = cast("Adapter", adapters.get(card.adapter or family.adapter))
    request = LoadRequest(card, family, Path(weights) if weights is not None else None, trust_remote_code)
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}", "use cpu, cuda or cuda:N") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no CUDA device is visible", "use --device cpu")
    return adapter(request).to(target)
