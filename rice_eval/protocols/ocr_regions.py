"""``region-tokens``: what one feature of a text region says of the characters in it; ``zero-shot-words``: ranking words."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rice_eval.adapters.base import EmbedsImage, EmbedsText, EncoderFacts
from rice_eval.bank.source import ImageTokens
from rice_eval.datasets.base import Annotation, Dataset, TextLine
from rice_eval.errors import DataError, PlanError
from rice_eval.metrics.multilabel import MultilabelStatistics
from rice_eval.metrics.text import normalise
from rice_eval.metrics.text_statistics import TextSums
from rice_eval.protocols.base import Context, Head, Outcome, Protocol
from rice_eval.protocols.ocr_lines import as_batch, crops_of, remarks
from rice_eval.protocols.segmentation import LAYER_SETS, LayerSet, check_choice, held_out, layers_of
from rice_eval.views import Frame, View

__all__ = ["RegionTokens", "ZeroShotWords", "region_mean"]


def region_mean(patches: Tensor, grid: tuple[int, int], frame: Frame, box: np.ndarray[Any, Any]) -> Tensor | None:
    """Mean of the tokens that a box covers, each weighed by the area it covers.

    Args:
        patches: ``(h * w, D)``.
        grid: ``(h, w)``.
        frame: the window.
        box: ``(4,)`` xyxy in pixels of the image.

    Returns:
        ``(D,)``, or None where the box lies outside the frame.
    """
    x1, y1, x2, y2 = frame.boxes(box[None], clip=False)[0]
    weights = []
    for low, high, cells, size in ((y1, y2, grid[0], frame.size[0]), (x1, x2, grid[1], frame.size[1])):
        edges = np.arange(cells + 1) * (size / cells)
        weights.append(np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None))
    area = np.outer(weights[0], weights[1]).reshape(-1)
    if area.sum() <= 0:
        return None
    share = torch.from_numpy((area / area.sum()).astype(np.float32)).to(patches.device)
    return share @ patches.float()


class _Regions:
    """Rides on a pass: one feature a legible line and layer; workers get none of its state."""

    def __init__(self, layers: Sequence[int], advance: Callable[[int], None]) -> None:
        self._layers, self._advance = tuple(layers), advance
        self.features: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.texts: list[str] = []
        self.images: list[int] = []
        self.missed = 0
        self.skipped = 0
        self.seconds = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    @property
    def lost(self) -> str:
        """What became of the lines that have no feature."""
        return f"{self.skipped} are don't-care or have no letter or digit, {self.missed} lie outside every frame"

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> tuple[TextLine, ...]:
        """The lines of the image."""
        return dataset.text(index)

    def consume(self, tokens: ImageTokens) -> None:
        """Take in one image: each line from the frame that shows most of it."""
        start = time.perf_counter()
        for line in tokens.target:
            if line.ignore or not normalise(line.text):
                self.skipped += 1
                continue
            box = np.concatenate([line.polygon.min(axis=0), line.polygon.max(axis=0)])
            shown = [_overlap(frame, box) for frame in tokens.frames]
            k = int(np.argmax(shown))
            found = {
                layer: region_mean(tokens.patches[layer][k], tokens.grids[layer][k], tokens.frames[k], box)
                for layer in self._layers
            }
            if any(f is None for f in found.values()):
                self.missed += 1
                continue
            for layer, feature in found.items():
                assert feature is not None
                self.features[layer].append(feature.cpu())
            self.texts.append(line.text)
            self.images.append(tokens.index)
        self.seconds += time.perf_counter() - start
        self._advance(1)


def _overlap(frame: Frame, box: np.ndarray[Any, Any]) -> float:
    x1, y1, x2, y2 = frame.boxes(box[None])[0]
    left, top, right, bottom = frame.content
    return float(max(0, min(x2, right) - max(x1, left)) * max(0, min(y2, bottom) - max(y1, top)))


def pieces_of(text: str, sizes: tuple[int, ...]) -> set[str]:
    """The runs of letters and digits of these lengths in a text, small letters."""
    words = [normalise(word) for word in text.split()]
    return {w[k : k + n] for w in words for n in sizes for k in range(len(w) - n + 1)}


@dataclass(frozen=True)
class RegionTokens(Protocol):
    """RICE's OCR task as a probe: which characters, or pieces of words, does one feature of a text region tell?

    The feature is the mean of the tokens that the line's box covers, each weighed by the area covered. One ridge regression
    a layer maps it to every label at once; layer and strength with the best mAP on held-out training images are fitted again
    on all.

    Attributes:
        labels: ``characters`` (36 letters and digits), or ``pieces``: the commonest runs of one to three of them in the
            training lines, in the place of a tokeniser's subwords.
        pieces: how many.
        ridges: strengths, times the number of regions.
        layer_set: ``last``, ``last4``, ``quarters`` or ``all``.
        holdout: share of the training images held out.
    """

    id: ClassVar[str] = "region-tokens"
    kind: ClassVar[str] = "ocr"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"text"})
    metric: ClassVar[str] = "map"

    labels: str = "characters"
    pieces: int = 256
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    layer_set: LayerSet = "quarters"
    holdout: float = 0.2

    def __post_init__(self) -> None:
        check_choice("labels", self.labels, ("characters", "pieces"))
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        positive = all(0 < ridge < math.inf for ridge in self.ridges)
        if not self.ridges or not positive or self.pieces < 1 or not 0 < self.holdout < 1:
            raise ValueError("ridges are above 0, pieces at least 1, holdout in (0, 1)")

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set``."""
        return layers_of(self.layer_set, facts)

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        layers = self.layers(context.facts)
        source = context.tokens("train", self.view)
        train = _Regions(layers, context.progress("regions", len(source.indices)))
        source.consume(train)
        sizes = (1,) if self.labels == "characters" else (1, 2, 3)
        found = [pieces_of(text, sizes) for text in train.texts]
        common = Counter(piece for pieces in found for piece in pieces).most_common()
        names = tuple(sorted(p for p, _ in common[: self.pieces]))
        pages = sorted(set(train.images))
        if len(pages) < 2 or not names:
            raise DataError(
                f"dataset '{context.train.name}': fewer than two training images have legible lines ({train.lost})",
                "use more training images",
            )
        truth = _labels(found, names)
        start = time.perf_counter()
        away = set(held_out(pages, self.holdout, self.seed)[1])
        held = np.array([i in away for i in train.images])
        grid, marks = [], []
        order = np.unique(np.array(train.images)[held], return_inverse=True)[1]
        for layer in layers:
            x = torch.stack(train.features[layer])
            for ridge in self.ridges:
                weight, bias = _ridge(x[~held], truth[~held], ridge)
                scores = (x[held] @ weight + bias).numpy()
                made = MultilabelStatistics([str(k) for k in range(order.max() + 1)], order, scores, truth[held], names)
                marks.append(float(made.values(np.ones((1, order.max() + 1)))["map"][0]))
                grid.append((layer, ridge))
        if np.isnan(marks).all():
            raise DataError(
                f"dataset '{context.train.name}': the held-out training images have none of the {len(names)} labels",
                "--set a larger holdout or more pieces, or use more training images",
            )
        layer, ridge = grid[int(np.nanargmax(marks))]
        weight, bias = _ridge(torch.stack(train.features[layer]), truth, ridge)
        fitted = time.perf_counter() - start
        test_source = context.tokens("test", self.view)
        test = _Regions((layer,), context.progress("predict", len(test_source.indices)))
        test_source.consume(test)
        if not test.texts:
            raise DataError(
                f"dataset '{context.test.name}': no test image has a legible line ({test.lost})",
                "check its labels with rice-eval data check, or take another split",
            )
        scores = (torch.stack(test.features[layer]) @ weight + bias).numpy()
        ids = {index: k for k, index in enumerate(test_source.indices)}
        statistics = MultilabelStatistics(
            [context.test.image_id(i) for i in test_source.indices],
            np.array([ids[i] for i in test.images]),
            scores,
            _labels([pieces_of(text, sizes) for text in test.texts], names),
            names,
        )
        chosen = {"layer": layer, "ridge": ridge}
        notes = [
            f"{what}: {part.skipped} lines are don't-care or have no letter or digit; they are no regions"
            for what, part in (("train", train), ("test", test))
            if part.skipped
        ]
        if train.missed or test.missed:
            notes.append(f"{train.missed} training and {test.missed} test lines lie outside every frame")
        return Outcome(
            statistics=statistics,
            chosen=chosen,
            layers=(layer,),
            heads=tuple(Head({"layer": g[0], "ridge": g[1]}, m) for g, m in zip(grid, marks)),
            seconds={"targets": train.seconds, "fit": fitted, "predict": test.seconds},
            warnings=tuple(notes),
        )


def _labels(found: Sequence[set[str]], names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.array([[name in pieces for name in names] for pieces in found], dtype=np.bool_)


def _ridge(x: Tensor, truth: np.ndarray[Any, np.dtype[np.bool_]], ridge: float) -> tuple[Tensor, Tensor]:
    """Weights ``(D, C)`` and biases ``(C,)`` of a ridge regression on standardised features, for raw ones."""
    wide = x.double()
    mean, scale = wide.mean(dim=0), (wide.var(dim=0, correction=0) + 1e-6).rsqrt()
    z = (wide - mean) * scale
    y = torch.from_numpy(truth).double()
    centre = y.mean(dim=0)
    gram = z.T @ z + ridge * len(z) * torch.eye(z.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(gram, z.T @ (y - centre))
    weight = solved * scale[:, None]
    return weight.float(), (centre - mean @ weight).float()


@dataclass(frozen=True)
class ZeroShotWords(Protocol):
    """Ranking candidate words for a crop with the text tower: no training.

    Every legible line that has a letter or digit is cut out (``TextCrops``), embedded as an image, and compared with the
    prompts of its own text and of other lines' texts, drawn at random.

    Attributes:
        view: of the crops.
        height, margin: see ``TextCrops``.
        prompt: with ``{}`` for the word.
        candidates: texts to choose among, the right one included; all there are where the split has fewer.
        batch: crops a forward.
    """

    id: ClassVar[str] = "zero-shot-words"
    kind: ClassVar[str] = "ocr"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"text"})
    abilities: ClassVar[frozenset[str]] = frozenset({"text", "image"})
    metric: ClassVar[str] = "accuracy"

    view: str = "letterbox=16p"
    height: int = 56
    margin: float = 0.15
    prompt: str = 'the word "{}"'
    candidates: int = 100
    batch: int = 32

    def __post_init__(self) -> None:
        try:
            written = self.prompt.format("RICE-EVAL")
        except (KeyError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"prompt '{self.prompt}' has other braces than one {{}} for the word") from error
        if "RICE-EVAL" not in written:
            raise ValueError("prompt has no {} for the word")
        if self.candidates < 2 or self.batch < 1 or self.height < 8 or not 0 <= self.margin < math.inf:
            raise ValueError("candidates at least 2, batch at least 1, height at least 8, margin 0 or more")

    def views(self) -> Mapping[str, Sequence[str]]:
        """None: embeddings of whole crops are not the bank's tokens."""
        return {}

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        encoder = context.encoder().to(context.device)
        if not isinstance(encoder, EmbedsText) or not isinstance(encoder, EmbedsImage):
            raise PlanError(f"encoder '{encoder.name}' embeds no text or no images", "choose one with a text tower")
        crops = crops_of(context.test, self.height, "fit", self.margin, 32.0)
        view = View.parse(self.view).resolve(encoder.multiple)
        red, green, blue = (round(255 * m) for m in context.facts.mean)
        texts = [crops.text(i)[0].text for i in range(len(crops))]
        wanted = [i for i, text in enumerate(texts) if normalise(text)]
        left = len(texts) - len(wanted)
        plain = (f"test: {left} of {len(texts)} lines have no letter or digit and are not ranked",) if left else ()
        words = sorted({texts[i] for i in wanted})
        if len(words) < 2:
            raise DataError(f"dataset '{context.test.name}': fewer than two different words to choose among")
        start = time.perf_counter()
        with torch.inference_mode():
            known = [
                encoder.embed_text([self.prompt.format(w) for w in words[k : k + 64]]).float().cpu()
                for k in range(0, len(words), 64)
            ]
            prompts = torch.cat(known)
        place = {word: k for k, word in enumerate(words)}
        metrics = ("accuracy", "recall_at_5")
        sums = TextSums(metrics)
        advance = context.progress("rank", len(wanted))
        for begin in range(0, len(wanted), self.batch):
            batch = wanted[begin : begin + self.batch]
            # A letterbox has one size: all crops go in one forward.
            windows = [view.apply(crops.image(i), (red, green, blue))[0][0] for i in batch]
            with torch.inference_mode():
                images = encoder.embed_image(as_batch(windows, context.device)).float().cpu()
            for i, similar in zip(batch, images @ prompts.T):
                right = place[texts[i]]
                others = np.random.default_rng((self.seed, i)).permutation(len(words))
                rivals = [int(k) for k in others if k != right][: self.candidates - 1]
                better = int((similar[rivals] >= similar[right]).sum())
                page = crops.base.image_id(crops.origin(i)[0])
                sums.add(page, (float(better < 1), float(better < 5)), (1.0, 1.0))
            advance(len(batch))
        return Outcome(
            statistics=sums.statistics(),
            chosen={"candidates": min(self.candidates, len(words))},
            layers=(context.facts.layers,),
            seconds={"predict": time.perf_counter() - start},
            warnings=(*remarks(crops, "test"), *plain),
            forwards=len(wanted),
        )
