"""Protocol ``zero-shot-seg``: patches against class names, for encoders with a text tower."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters.base import EmbedsPatches, EmbedsText, Encoder
from rice_eval.datasets.base import Annotation
from rice_eval.errors import PlanError
from rice_eval.protocols.base import Context, Head, Outcome, Protocol
from rice_eval.protocols.online import score_online
from rice_eval.views import View

__all__ = ["ZeroShotSeg", "class_embeddings"]


@dataclass(frozen=True)
class ZeroShotSeg(Protocol):
    """Each patch takes the class whose name is nearest in the text space; cosines are upsampled bilinearly before the choice.

    Patches come from ``embed_patches``: for CLIP, values of the last attention through its output, norm and projection, without
    attention (MaskCLIP, arXiv 2112.01071, section 3.2).

    Attributes:
        templates: sentences with ``{}`` for the name; a class is the mean of its sentences' embeddings.
    """

    id: ClassVar[str] = "zero-shot-seg"
    kind: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"semantic"})
    abilities: ClassVar[frozenset[str]] = frozenset({"text"})
    metric: ClassVar[str] = "miou"
    distributed: ClassVar[bool] = True

    tokens: str = "online"
    templates: tuple[str, ...] = ("a photo of a {}.", "a photo of the {}.", "there is a {} in the scene.")

    def __post_init__(self) -> None:
        if not self.templates or not all("{}" in t for t in self.templates):
            raise ValueError("templates are sentences with {} in the name's place, at least one")
        if not self.norm:
            raise ValueError("norm can't be left out: the text space lies behind it")
        if self.tokens != "online":
            raise ValueError("tokens must be 'online': nothing is banked")

    def views(self) -> dict[str, tuple[str, ...]]:
        """None: nothing is read from the bank."""
        return {"train": (), "test": ()}

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``; the training split is not looked at."""
        encoder = context.encoder()
        if not isinstance(encoder, EmbedsPatches):
            raise PlanError(
                f"encoder '{encoder.name}' does not place patches in its text space",
                "choose another encoder for zero-shot-seg",
            )
        texts = class_embeddings(encoder, context.test.classes, self.templates)
        patches = encoder

        def logits_of(images: Tensor) -> Tensor:
            tokens, (h, w) = patches.embed_patches(images.to(context.device))
            cosines = F.normalize(tokens.float(), dim=-1) @ texts.T.to(tokens.device, torch.float32)
            return cosines.transpose(1, 2).reshape(len(images), -1, h, w)

        start = time.perf_counter()
        views = (View.parse(self.view).resolve(encoder.multiple),)
        scorer, forwards = score_online(context, views, logits_of, squeeze=False)
        settings = {"templates": len(self.templates)}
        return Outcome(
            statistics=scorer.statistics(),
            chosen=settings,
            layers=(context.facts.layers,),
            heads=(Head(settings, None),),
            seconds={"predict": time.perf_counter() - start},
            panels=tuple(scorer.panels),
            warnings=scorer.warnings(),
            predictions=scorer.predictions,
            forwards=forwards,
        )


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """``(C, E)``: the mean of each class's sentences' embeddings, L2-normalised.

    Raises:
        PlanError: an encoder without a text tower.
    """
    if not isinstance(encoder, EmbedsText):
        raise PlanError(f"encoder '{encoder.name}' has no text tower", "choose one with (rice-eval list encoders)")
    sentences = [t.replace("{}", name) for name in names for t in templates]
    embedded = encoder.embed_text(sentences).float()
    return F.normalize(embedded.view(len(names), len(templates), -1).mean(dim=1), dim=-1)
