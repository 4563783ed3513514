"""Protocols ``cloc-region`` and ``region-retrieval``: given regions against texts, with nothing trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters.base import EmbedsText, ProjectsTokens
from rice_eval.errors import DataError, PlanError
from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.protocols.base import Context, Outcome
from rice_eval.protocols.regions import Pooling, RegionProtocol

__all__ = ["RECALLS", "ClocRegion", "RegionRetrieval", "embed_texts", "recall_hits", "text_space"]

RECALLS = (1, 5, 10)
_ROWS = 4096  # rows of one similarity matrix


def text_space(context: Context, protocol: str, how: str) -> Callable[[Tensor], Tensor]:
    """From pooled features to the text space: the encoder's linear map of its tokens; a region head is there already.

    Args:
        protocol: who asks, for messages.
        how: ``roialign``, ``mask`` or ``prompter``.

    Raises:
        PlanError: an encoder without a linear map of its tokens.
    """
    if how == "prompter":
        return lambda x: x
    encoder = context.encoder()
    if not isinstance(encoder, ProjectsTokens):
        raise PlanError(
            f"protocol '{protocol}': encoder '{encoder.name}' has no linear map from tokens to its text space",
            "choose an encoder with one (CLIP) or with a region head (CLOC)",
        )
    encoder.project_tokens(torch.zeros(1, context.facts.widths[-1]))  # refuse before the pass, not after it
    return lambda x: encoder.project_tokens(x).cpu() if len(x) else x


def embed_texts(context: Context, texts: Sequence[str]) -> Tensor:
    """``(T, E)`` L2-normalised, on the CPU."""
    encoder = cast(EmbedsText, context.encoder())
    return F.normalize(encoder.embed_text(list(texts)).float().cpu(), dim=1)


@dataclass(frozen=True)
class _ZeroShot(RegionProtocol):
    """Regions in the text space: by the encoder's region head, or pooled normed tokens of the last layer through its projection."""

    abilities: ClassVar[frozenset[str]] = frozenset({"text"})

    how: Pooling = "prompter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.norm:
            raise ValueError("the text space is reached from normed tokens: norm is true")

    def views(self) -> Mapping[str, Sequence[str]]:
        """The test split alone: nothing is trained."""
        return {"test": (self.view,)}

    def finish(self, context: Context) -> Callable[[Tensor], Tensor]:
        """From pooled tokens to the text space.

        Raises:
            PlanError: an encoder without a linear map of its tokens, or without image embeddings for the control.
        """
        if self.control and "image" not in context.facts.abilities:
            raise PlanError(
                f"protocol '{self.id}': encoder '{context.encoder().name}' embeds no images, which control=true needs",
                "leave the control out",
            )
        return text_space(context, self.id, self.how)


@dataclass(frozen=True)
class ClocRegion(_ZeroShot):
    """CLOC's region classification (arXiv 2410.02746): ground-truth boxes, cosine with the class names' embeddings, no template.

    Names are taken as the dataset gives them. Crowds are no regions.
    """

    id: ClassVar[str] = "cloc-region"

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        names = context.test.things
        start = time.perf_counter()
        finish = self.finish(context)
        texts = embed_texts(context, names)
        embedded = time.perf_counter() - start
        found = self.collect(context, "test", self.layers(context.facts), finish)
        start = time.perf_counter()
        predicted: dict[str, NDArray[np.int64]] = {}
        for method, layer in found.found.parts:
            x = F.normalize(found.found.features(method, layer), dim=1)
            predicted[method] = (x @ texts.T).argmax(dim=1).numpy()
        return Outcome(
            statistics=found.found.statistics(names, predicted),
            chosen={"how": self.how},
            layers=self.layers(context.facts),
            seconds={"texts": embedded, "pool": found.seconds, "predict": time.perf_counter() - start},
            warnings=found.found.warnings("test"),
            forwards=found.found.forwards,
        )


@dataclass(frozen=True)
class RegionRetrieval(_ZeroShot):
    """Region-text retrieval over all regions of the test split, both ways.

    Equal phrases are one text and equal boxes of an image one region; any of a query's partners counts. Intervals resample the images
    that queries come from, against the whole gallery.
    """

    id: ClassVar[str] = "region-retrieval"
    metric: ClassVar[str] = "text_to_region_r10"

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        finish = self.finish(context)
        layers = self.layers(context.facts)
        found = self.collect(context, "test", layers, finish)
        rows = found.found
        if len(rows.names) != len(rows.labels):
            raise DataError(
                f"dataset '{context.test.name}' has no phrases for its boxes", "choose a set with region texts"
            )
        start = time.perf_counter()
        phrases = list(dict.fromkeys(rows.names))
        text_of = {phrase: k for k, phrase in enumerate(phrases)}
        boxes = [
            (image, *context.test.instances(rows.indices[image]).boxes[place].tolist()) for image, place in rows.boxes
        ]
        keys = list(dict.fromkeys(boxes))
        region_of = {key: k for k, key in enumerate(keys)}
        pairs = np.array([(region_of[b], text_of[t]) for b, t in zip(boxes, rows.names)], dtype=np.int64)
        _, first = np.unique(pairs[:, 0], return_index=True)
        texts = embed_texts(context, phrases)
        image = np.array(rows.image)
        numerators, denominators, metrics = [], [], []
        for method, layer in rows.parts:
            x = F.normalize(rows.features(method, layer)[torch.from_numpy(first)], dim=1)
            for name, queries, gallery, side in (("text_to_region", texts, x, 1), ("region_to_text", x, texts, 0)):
                hits = recall_hits(queries, gallery, pairs[:, [side, 1 - side]])
                # A query belongs to the image of each of its pairs.
                asked = pairs[:, side]
                for k in RECALLS:
                    right = np.bincount(image, weights=hits[k][asked].astype(float), minlength=len(rows.ids))
                    numerators.append(right)
                    denominators.append(np.bincount(image, minlength=len(rows.ids)).astype(float))
                    metrics.append(f"{name}_r{k}" + ("" if method == self.how else f"_{method}"))
        return Outcome(
            statistics=RatioStatistics(
                tuple(rows.ids), np.stack(numerators, axis=1), np.stack(denominators, axis=1), tuple(metrics)
            ),
            chosen={"how": self.how, "regions": len(keys), "texts": len(phrases)},
            layers=layers,
            seconds={"pool": found.seconds, "predict": time.perf_counter() - start},
            warnings=rows.warnings("test"),
            forwards=rows.forwards,
        )


def recall_hits(queries: Tensor, gallery: Tensor, pairs: NDArray[np.int64]) -> dict[int, NDArray[np.bool_]]:
    """Whether a partner of each query is among its k nearest by cosine.

    Args:
        queries, gallery: ``(Q, E)`` and ``(G, E)``, L2-normalised.
        pairs: ``(P, 2)`` rows (query, partner in the gallery).

    Returns:
        k -> ``(Q,)``; of equal similarities, partners come last: a tie is no hit.
    """
    out = {k: np.zeros(len(queries), bool) for k in RECALLS}
    order = np.argsort(pairs[:, 0], kind="stable")
    asked, partners = pairs[order, 0], torch.from_numpy(pairs[order, 1].copy())
    for start in range(0, len(queries), _ROWS):
        similarity = queries[start : start + _ROWS] @ gallery.T
        lo, hi = np.searchsorted(asked, [start, start + _ROWS])
        rows = torch.from_numpy(asked[lo:hi] - start)
        mine = similarity[rows, partners[lo:hi]]
        best = torch.full((len(similarity),), -torch.inf).scatter_reduce(0, rows, mine, "amax")
        partner = torch.zeros_like(similarity, dtype=torch.bool)
        partner[rows, partners[lo:hi]] = True
        before = ((similarity >= best[:, None]) & ~partner).sum(dim=1).numpy()
        for k in RECALLS:
            out[k][start : start + _ROWS] = before < k
    return out
