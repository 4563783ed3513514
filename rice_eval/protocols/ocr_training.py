"""What readers of lines share in fitting and testing: training lines with their targets, and riders on the passes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rice_eval.bank.source import ImageTokens
from rice_eval.datasets.base import Dataset
from rice_eval.datasets.text_crops import TextCrops
from rice_eval.errors import DataError
from rice_eval.metrics.text import one_minus_ned
from rice_eval.protocols.ocr_lines import Charset, LineScorer, need_lines, remarks
from rice_eval.protocols.segmentation import held_out

__all__ = ["ReadsLines", "Rider", "TrainingLines"]


@dataclass(frozen=True)
class TrainingLines:
    """The lines of a training split.

    Attributes:
        crops: they are crops of.
        charset: what targets are written in.
        texts: index -> transcript.
        targets: index -> classes of the transcript, without the characters that the charset lacks.
        fit, held: indices to fit on, and those of held-out images.
    """

    crops: TextCrops
    charset: Charset
    texts: dict[int, str]
    targets: dict[int, list[int]]
    fit: tuple[int, ...]
    held: tuple[int, ...]

    @classmethod
    def of(
        cls, crops: TextCrops, indices: Sequence[int], charset: str, choose: bool, share: float, seed: int
    ) -> TrainingLines:
        """Lines of a split, parted by images where something is to be chosen.

        Args:
            crops: of the training split.
            indices: those that have tokens.
            charset: see ``Charset.of``.
            choose: whether anything is held out.
            share, seed: see ``held_out``.

        Raises:
            DataError: no line at all.
        """
        need_lines(crops, "training")
        if not indices:
            raise DataError(
                f"dataset '{crops.name}', split '{crops.split}': every training image with a legible line was left out",
                "replace the images that can't be decoded",
            )
        texts = {i: crops.text(i)[0].text for i in indices}
        written = Charset.of(charset, list(texts.values()))
        targets = {i: written.encode(text)[0] for i, text in texts.items()}
        pages = sorted({crops.origin(i)[0] for i in indices})
        away = set(held_out(pages, share, seed)[1]) if choose else set()
        fit = tuple(i for i in indices if crops.origin(i)[0] not in away)
        held = tuple(i for i in indices if crops.origin(i)[0] in away)
        return cls(crops, written, texts, targets, fit, held)

    def mark(self, readings: Sequence[str]) -> float:
        """Mean 1-NED in percent of what was read of the held-out lines, in the order of ``held``."""
        scores = [one_minus_ned(self.charset.fold(self.texts[i]), read) for i, read in zip(self.held, readings)]
        return 100.0 * float(np.mean(scores)) if scores else 0.0

    def notes(self) -> tuple[str, ...]:
        """What a reader of the record must know of these lines."""
        outside = Counter(c for text in self.texts.values() for c in self.charset.encode(text)[1])
        if not outside:
            return remarks(self.crops, "train")
        shown = " ".join(repr(c) for c, _ in outside.most_common(8)) + (" …" if len(outside) > 8 else "")
        lines = sum(bool(self.charset.encode(text)[1]) for text in self.texts.values())
        return (
            *remarks(self.crops, "train"),
            f"train: {lines} of {len(self.texts)} lines have characters outside the charset '{self.charset.name}', taken out "
            f"of their targets ({sum(outside.values())} characters: {shown})",
        )


class Rider:
    """A consumer of a pass that asks nothing of the image and times what it does; decoding workers get none of its state.

    Args:
        advance: called with 1 after each image.
    """

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self.seconds = advance, 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Any, ...]) -> None:
        """Nothing."""

    def consume(self, tokens: ImageTokens) -> None:
        """Take in one image."""
        start = time.perf_counter()
        self.take(tokens)
        self.seconds += time.perf_counter() - start
        self._advance(1)

    def take(self, tokens: ImageTokens) -> None:
        """What a subclass does with an image."""
        raise NotImplementedError


class ReadsLines(Rider):
    """Reads the test split once, riding on its pass.

    Args:
        read: the text of one crop.
        scorer: takes what was read.
        advance: see ``Rider``.
    """

    def __init__(self, read: Callable[[ImageTokens], str], scorer: LineScorer, advance: Callable[[int], None]) -> None:
        super().__init__(advance)
        self._read, self._scorer = read, scorer

    def take(self, tokens: ImageTokens) -> None:
        """Read one crop."""
        self._scorer.add(tokens.index, self._read(tokens))
