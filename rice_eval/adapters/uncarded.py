"""Encoders named on the command line without a card: ``ADAPTER:REFERENCE``."""

from __future__ import annotations

import re

from rice_eval.cards import EncoderCard, FamilyCard, SourceCard
from rice_eval.errors import NotFoundError

__all__ = ["card_for"]

# Adapters that can build an encoder from a bare reference, and the source field the reference goes to.
_FIELDS = {"timm": "timm", "open_clip": "open_clip", "hf": "hub", "file": "file", "onnx": "file"}


def card_for(name: str) -> tuple[FamilyCard, EncoderCard]:
    """A card made up for ``ADAPTER:REFERENCE``; the adapter fills in patch and resolution from what it loads.

    Raises:
        NotFoundError: an adapter that takes no bare reference.
    """
    adapter, _, reference = name.partition(":")
    if adapter not in _FIELDS or not reference:
        raise NotFoundError(
            f"no encoder is named '{name}'", f"without a card use one of {', '.join(a + ':…' for a in _FIELDS)}"
        )
    slug = re.sub(r"[^a-z0-9.\-]+", "-", name.lower()).strip("-")
    card = EncoderCard(
        name=slug,
        source=SourceCard.model_validate({_FIELDS[adapter]: reference}),
        arch="as loaded",
        patch=1,
        resolution=1,
        public=False,
    )
    return FamilyCard(family=adapter, title=f"from {adapter}", adapter=adapter, encoders=(card,)), card
