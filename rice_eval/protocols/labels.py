"""A share of the training labels: fixed, listed splits, read from the bank of the whole training set."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rice_eval.bank.source import Consumer, ImageTokens, TokenReader, TokenSource
from rice_eval.datasets.base import Dataset
from rice_eval.protocols.base import Context, Protocol
from rice_eval.views import Frame

__all__ = ["ALL", "FewLabels", "labelled_images", "share_of"]

ALL = "all"
FEWEST = 2
"""Images below which nothing could be held out."""


def share_of(labels: str) -> Fraction:
    """``all`` as 1, ``1/64`` or ``0.1`` as the number it is.

    Raises:
        ValueError: anything else, or a share outside (0, 1).
    """
    if labels == ALL:
        return Fraction(1)
    try:
        share = Fraction(labels)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"labels '{labels}' is neither 'all' nor a share such as 1/64") from error
    if not 0 < share < 1:
        raise ValueError(f"labels '{labels}' is no share between 0 and 1; 'all' takes every image")
    return share


def labelled_images(image_ids: Sequence[str], labels: str, seed: int) -> tuple[int, ...]:
    """The images of a split: those whose ``sha256("SEED:IMAGE ID")`` comes first, as many as the share, at least two.

    The rule needs no list and no generator, so anybody can make the split again; at one seed a smaller split lies inside every
    larger one.

    Args:
        image_ids: of the whole training set.
        labels: ``all`` or a share.
        seed: number of the split.

    Returns:
        Their numbers, ascending.
    """
    share = share_of(labels)
    if share == 1:
        return tuple(range(len(image_ids)))
    count = min(len(image_ids), max(FEWEST, round(share * len(image_ids))))
    order = sorted(range(len(image_ids)), key=lambda i: hashlib.sha256(f"{seed}:{image_ids[i]}".encode()).digest())
    return tuple(sorted(order[:count]))


@dataclass(frozen=True)
class FewLabels(Protocol):
    """A protocol that may train on a share of the images.

    Attributes:
        labels: ``all``, or the share of training images whose labels are read (``1/64``); see ``labelled_images``, whose seed is
            the protocol's.
    """

    labels: str = ALL

    def settings(self) -> dict[str, Any]:
        """Every field; ``labels`` where it is not all of them, so that the hash of a whole run does not depend on its being there."""
        plain = super().settings()
        if self.labels == ALL:
            del plain["labels"]
        return plain

    def labelled(self, context: Context) -> tuple[Context, tuple[str, ...]]:
        """The context with the share's images alone in its training source, and what a record should say of them.

        The bank stays that of the whole set: only passes over it skip the other images, and their masks are not read.
        """
        if self.labels == ALL:
            return context, ()
        ids = [context.train.image_id(i) for i in range(len(context.train))]
        picked = labelled_images(ids, self.labels, self.seed)
        digest = hashlib.sha256("\n".join(ids[i] for i in picked).encode()).hexdigest()[:16]
        note = f"trained on {len(picked)} of {len(ids)} images: labels {self.labels}, split {self.seed}, ids' sha256 {digest}"
        whole = context.tokens

        def tokens(split: str, view: str) -> TokenSource:
            source = whole(split, view)
            return _Part(source, picked) if split == "train" else source

        return dataclasses.replace(context, tokens=tokens), (note,)


class _Part:
    """A source that shows some images alone."""

    def __init__(self, source: TokenSource, picked: Sequence[int]) -> None:
        self._source, self._picked = source, frozenset(picked)

    @property
    def forwards(self) -> int:
        return self._source.forwards

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(i for i in self._source.indices if i in self._picked)

    def consume(self, *consumers: Consumer) -> None:
        self._source.consume(*(_Some(consumer, self._picked) for consumer in consumers))

    def reader(self) -> TokenReader:
        return self._source.reader()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class _Some:
    """A consumer that sees some images alone."""

    def __init__(self, consumer: Consumer, picked: frozenset[int]) -> None:
        self._consumer, self._picked = consumer, picked

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> Any:
        return self._consumer.annotate(dataset, index, frames) if index in self._picked else None

    def consume(self, tokens: ImageTokens) -> None:
        if tokens.index in self._picked:
            self._consumer.consume(tokens)
