"""Protocol ``read-page``: whole images, found by ``text-mask``, read by ``ctc-linear``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from rice_eval.adapters.base import Encoder, EncoderFacts
from rice_eval.datasets.base import Annotation, Dataset, TextLine
from rice_eval.datasets.text_crops import TextCrops, crop_of, line_facts
from rice_eval.metrics.text import distance, word_distance
from rice_eval.metrics.text_boxes import match
from rice_eval.metrics.text_statistics import TextStatistics, TextSums
from rice_eval.protocols.base import Context, Outcome, Panel, Protocol
from rice_eval.protocols.ocr import CtcLinear
from rice_eval.protocols.ocr_lines import LineReader, as_batch, columns, group_names, groups_of, spread
from rice_eval.protocols.ocr_mask import Finder, TextMask
from rice_eval.protocols.segmentation import LayerSet
from rice_eval.report.panels import Polygons
from rice_eval.views import Frame, View

__all__ = ["PageScorer", "ReadPage", "reading_order"]

PAGE_METRICS = ("cer", "wer", "spotting", "hmean", "precision", "recall")

Polygon = NDArray[np.float64]


def reading_order(polygons: Sequence[Polygon]) -> list[int]:
    """Lines from top to bottom, those of one row from left to right.

    A line belongs to the row above it when their middles are less than half the smaller of their heights apart.
    """
    middles = [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in polygons]
    heights = [float(np.ptp(p[:, 1])) for p in polygons]
    rows: list[list[int]] = []
    for i in sorted(range(len(polygons)), key=lambda k: middles[k][1]):
        last = rows[-1][-1] if rows else None
        if last is not None and middles[i][1] - middles[last][1] < 0.5 * min(heights[i], heights[last]):
            rows[-1].append(i)
        else:
            rows.append([i])
    return [i for row in rows for i in sorted(row, key=lambda k: middles[k][0])]


class PageScorer:
    """Scores what was read of whole images.

    CER and WER are over the text of the image in reading order, lines joined by blanks, don't-care lines and what was found
    on them left out on both sides; they ignore capitals, since SROIE writes every transcript in them, whatever is printed.
    Word spotting pairs regions by the rule of ICDAR 2015, and counts a pair where both texts are equal but for capitals (its
    end-to-end task, generic).

    Args:
        dataset: the test split.
        panels: images to keep for the report.
        keep: whether every reading is kept.
    """

    def __init__(self, dataset: Dataset, panels: int, keep: bool) -> None:
        self._data, self._wanted = dataset, panels
        self._sums = TextSums(PAGE_METRICS)
        self._names: list[str] = []
        self._panels: dict[int, Panel] = {}
        self.kept: dict[str, Any] | None = {} if keep else None

    def add(self, index: int, lines: Sequence[TextLine], found: Sequence[Polygon], texts: Sequence[str]) -> None:
        """Score one image: ``found`` regions and what was read of them."""
        result = match([t.polygon for t in lines], [t.ignore for t in lines], found)
        hits, true, seen = len(result.pairs), len(result.truths), len(result.found)
        same = sum(lines[i].text.lower() == texts[j].lower() for i, j in result.pairs)
        truth = _joined([(lines[i].polygon, lines[i].text) for i in result.truths])
        read = _joined([(found[j], texts[j]) for j in result.found])
        truth, read = truth.lower(), read.lower()
        edits, words = distance(truth, read), word_distance(truth, read)
        name = self._data.image_id(index)
        self._sums.add(
            name,
            (edits, words, 2 * same, 2 * hits, hits, hits),
            (len(truth), len(truth.split()), true + seen, true + seen, seen, true),
        )
        facts = line_facts(self._data, index)
        matched = {i for i, _ in result.pairs}
        for i in result.truths:
            groups = groups_of(lines[i], facts[i] if facts is not None else None)
            self._names += groups
            self._sums.groups(name, (0, 0, 0, 0, 0, float(i in matched)), (0, 0, 0, 0, 0, 1), groups)
        shown = Polygons(tuple(found), tuple(texts))
        legible = [line for line in lines if not line.ignore]
        if self._wanted:
            polygons = Polygons(tuple(t.polygon for t in legible), tuple(t.text for t in legible))
            self._panels[index] = Panel(name, index, polygons, shown)
        if self.kept is not None:
            self.kept[name] = shown

    def finish(self) -> tuple[TextStatistics, tuple[Panel, ...]]:
        """Statistics, and panels of images evenly spread."""
        shown = spread(sorted(self._panels), self._wanted)
        return self._sums.statistics(group_names(self._names)), tuple(self._panels[i] for i in sorted(shown))


def _joined(lines: Sequence[tuple[Polygon, str]]) -> str:
    order = reading_order([polygon for polygon, _ in lines])
    return " ".join(" ".join(lines[k][1].split()) for k in order if lines[k][1].strip())


@dataclass(frozen=True)
class ReadPage(Protocol):
    """Reading whole images: ``text-mask`` finds lines, ``ctc-linear`` reads them.

    Both heads are fitted as those protocols fit them, on the same tokens; the regions found on a test image are cut out of it
    and pushed through the encoder, which the record counts among its forwards.

    Attributes:
        crop_view: view of the crops.
        height, scale, margin, charset, pool, frame, beam: see ``ctc-linear``.
        layer_set: of both heads.
        thin, threshold, cell, min_tokens, grow, join, smooth: see ``text-mask``.
        mask_lrs, mask_steps: the sweep and steps of the mask.
        lrs, steps, batch: those of the reader.
    """

    id: ClassVar[str] = "read-page"
    kind: ClassVar[str] = "ocr"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"text"})
    metric: ClassVar[str] = "cer"
    rereads: ClassVar[bool] = True

    crop_view: str = "native,pad=patch"
    height: int = 56
    scale: str = "fit"
    margin: float = 0.15
    charset: str = "ascii"
    pool: str = "mean"
    frame: float = 14.0
    beam: int = 0
    layer_set: LayerSet = "quarters"
    thin: bool = True
    threshold: float = 0.5
    cell: float = 0.0
    min_tokens: float = 0.5
    grow: float = 0.5
    join: float = 0.0
    smooth: float = 14.0
    mask_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    mask_steps: int = 300
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    steps: int = 800
    batch: int = 32

    def __post_init__(self) -> None:
        self.mask()
        self.reader()

    def mask(self) -> TextMask:
        """The text mask as a protocol of its own."""
        return TextMask(
            view=self.view, norm=self.norm, tokens=self.tokens, seed=self.seed, layer_set=self.layer_set,
            lrs=self.mask_lrs, steps=self.mask_steps, thin=self.thin, threshold=self.threshold, cell=self.cell,
            min_tokens=self.min_tokens, grow=self.grow, join=self.join, smooth=self.smooth,
        )  # fmt: skip

    def reader(self) -> CtcLinear:
        """The reader of lines as a protocol of its own."""
        return CtcLinear(
            view=self.crop_view, norm=self.norm, tokens=self.tokens, seed=self.seed, height=self.height,
            scale=self.scale, margin=self.margin, charset=self.charset, pool=self.pool, frame=self.frame,
            beam=self.beam, layer_set=self.layer_set, lrs=self.lrs, steps=self.steps, batch=self.batch,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Every field, and every field of both protocols, so that their defaults are part of the hash too."""
        return {**super().settings(), "mask": self.mask().settings(), "reader": self.reader().settings()}

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """Those of both heads."""
        return self.mask().layers(facts)

    def views(self) -> Mapping[str, Sequence[str]]:
        """Images of both splits, and crops of the training lines."""
        return {"train": (self.view,), "test": (self.view,), "train/crops": (self.crop_view,)}

    def part(self, name: str, dataset: Dataset) -> TextCrops:
        """See ``CtcLinear.part``."""
        return self.reader().part(name, dataset)

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        mask, reader = self.mask(), self.reader()
        finding = mask.fit(context, 2, mask.train_pass)
        reading = reader.fit(context)
        scorer = PageScorer(context.test, context.panels, context.keep_predictions)
        crops = _CropReader(self, reading.reader, context)

        def found(
            index: int, lines: tuple[TextLine, ...], probability: NDArray[np.float32], polygons: list[Polygon]
        ) -> None:
            scorer.add(index, lines, polygons, crops.read(context.test.image(index), polygons))

        test = context.tokens("test", self.view)
        finder = Finder(mask, finding.head, finding.layer, found, context.progress("read", len(test.indices)))
        test.consume(finder)
        statistics, panels = scorer.finish()
        return Outcome(
            statistics=statistics,
            chosen={**{f"mask_{k}": v for k, v in finding.chosen.items()}, **reading.chosen},
            layers=tuple(dict.fromkeys((reading.reader.layer, finding.layer))),
            heads=(*finding.heads, *reading.heads),
            seconds={
                "targets": finding.seconds["targets"] + reading.seconds["targets"],
                "fit": finding.seconds["fit"] + reading.seconds["fit"],
                "predict": finder.seconds,
            },
            panels=panels,
            warnings=reading.warnings,
            predictions=scorer.kept,
            forwards=crops.forwards,
        )


class _CropReader:
    """Cuts regions out of an image, encodes them and reads them."""

    def __init__(self, protocol: ReadPage, reader: LineReader, context: Context) -> None:
        self._protocol, self._reader = protocol, reader
        self._encoder: Encoder = context.encoder().to(context.device)
        self._view = View.parse(protocol.crop_view).resolve(self._encoder.multiple)
        red, green, blue = (round(255 * m) for m in context.facts.mean)
        self._fill = red, green, blue
        self._device = context.device
        self._most = protocol.reader().max_aspect
        self.forwards = 0

    @torch.inference_mode()
    def read(self, image: NDArray[np.uint8], polygons: Sequence[Polygon]) -> list[str]:
        """The text of every region, in order."""
        p = self._protocol
        waiting: dict[tuple[int, int], list[tuple[int, Any, Frame, int]]] = {}
        for number, polygon in enumerate(polygons):
            crop, content = crop_of(image, polygon, p.height, p.reader().part_scale, p.margin, self._most)
            ((window, frame),) = self._view.apply(crop, self._fill)
            waiting.setdefault(frame.size, []).append((number, window, frame, content))
        texts = [""] * len(polygons)
        for group in waiting.values():
            for start in range(0, len(group), 32):
                batch = group[start : start + 32]
                tokens = self._encoder.encode(
                    as_batch([w for _, w, _, _ in batch], self._device), (self._reader.layer,), p.norm
                )
                self.forwards += len(batch)
                patches, grid = tokens.patches[self._reader.layer], tokens.grids[self._reader.layer]
                for row, (number, _, frame, content) in zip(patches, batch):
                    texts[number] = self._reader.read(row.float().cpu(), grid, columns(grid, frame, content))
        return texts
