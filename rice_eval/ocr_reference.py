"""Rows of OCR systems beside those of encoders: the ceiling that a reader of the numbers knows.

A system finds and reads text by itself, so it has no layer, no probe and no bank; it runs through the same crops, matching
and statistics as ``ctc-linear`` and ``read-page``, and its rows are kept apart from records: they are never ranked.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from rice_eval.cards import TaskCard, catalogue
from rice_eval.datasets import load_dataset
from rice_eval.datasets.base import Dataset, TextLine
from rice_eval.datasets.subset import Subset
from rice_eval.errors import DataError, MissingExtraError, PlanError
from rice_eval.metrics.text_statistics import TextStatistics
from rice_eval.pictures import save_pictures
from rice_eval.protocols.base import Panel
from rice_eval.protocols.base import Protocol as Scored
from rice_eval.protocols.ocr_lines import LineScorer, crops_of, need_lines, remarks
from rice_eval.protocols.ocr_mask import MaskScorer, text_labels
from rice_eval.protocols.ocr_pages import PageScorer
from rice_eval.registry import protocols as registered
from rice_eval.results.bootstrap import intervals
from rice_eval.results.curves import group_intervals
from rice_eval.results.entries import class_entries, metric_entries

__all__ = ["RapidOcr", "Reference", "System", "evaluate_reference"]

PROTOCOLS = ("ctc-linear", "text-mask", "read-page")
"""The protocols that a reference has rows for."""

Picture = NDArray[np.uint8]
Polygon = NDArray[np.float64]


class System(Protocol):
    """An OCR system."""

    name: str

    def page(self, image: Picture) -> tuple[list[Polygon], list[str]]:
        """Regions ``(4, 2)`` in pixels and texts of an ``(H, W, 3)`` RGB image."""
        ...

    def line(self, crop: Picture) -> str:
        """The text of one line, cut out."""
        ...


class RapidOcr:
    """PP-OCRv4 (mobile) in ONNX, as the package ``rapidocr-onnxruntime`` brings it; English and Chinese."""

    name = "rapidocr-ppocrv4"

    def __init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise MissingExtraError.of("rapidocr-onnxruntime", "ocr-reference", "the reference row") from error
        self._engine: Any = RapidOCR()

    def page(self, image: Picture) -> tuple[list[Polygon], list[str]]:
        """See ``System``."""
        found, _ = self._engine(np.ascontiguousarray(image[..., ::-1]))  # the engine takes BGR
        rows = found or []
        return [np.asarray(box, dtype=np.float64) for box, _, _ in rows], [str(text) for _, text, _ in rows]

    def line(self, crop: Picture) -> str:
        """See ``System``; the crop is not searched for text."""
        found, _ = self._engine(np.ascontiguousarray(crop[..., ::-1]), use_det=False, use_cls=False, use_rec=True)
        return str(found[0][0]) if found else ""


@dataclass(frozen=True)
class Reference:
    """A reference row: the system, task and protocol, metrics with intervals in percent, its groups, its file."""

    system: str
    task: str
    protocol: str
    metrics: dict[str, tuple[float, float | None, float | None]]
    groups: dict[str, dict[str, float | None]]
    path: Path


def evaluate_reference(
    system: System,
    *,
    task: str | None = None,
    dataset: str = "scenes-text",
    data: Path | None = None,
    options: dict[str, Any] | None = None,
    protocols: Sequence[str] = PROTOCOLS,
    limit_test: int | None = None,
    results: Path = Path("results"),
    panels: int = 8,
    resamples: int = 2000,
    include: Sequence[Path] = (),
    progress: Callable[[str, int], Callable[[int], None]] = lambda label, total: lambda n: None,
) -> list[Reference]:
    """Score a system on a test split with the scorers of the protocols, and write one JSON a protocol.

    Args:
        system: what reads.
        task: a task card's name; or give ``dataset``.
        dataset, data, options: as for ``rice_eval.evaluate``.
        protocols: ``ctc-linear`` (lines cut out along their true polygons, 48 px high as the system wants them),
            ``text-mask`` (whole images: Hmean, and the pixel IoU of the regions found) and ``read-page`` (whole images: Hmean,
            word spotting, CER, WER).
        limit_test: keep only this many test images.
        results: rows go to its folder ``references``.
        panels: images to draw for ``read-page``.
        resamples: of the bootstrap.
        include: folders with more cards.
        progress: opens a bar.

    Raises:
        PlanError: a protocol that the reference can't stand beside.
    """
    from rice_eval.plan import task_for_dataset

    card = (
        catalogue(tuple(include)).task(task)
        if task
        else task_for_dataset(catalogue(tuple(include)), "ocr", dataset, options or {})
    )
    unknown = [p for p in protocols if p not in PROTOCOLS]
    if unknown:
        raise PlanError(f"a reference has no row for protocol '{unknown[0]}'", f"choose {', '.join(PROTOCOLS)}")
    test = load_dataset(card.dataset, card.test, data, card.options)
    if limit_test is not None:
        test = Subset(test, limit_test)
    system = _Once(system)
    rows = []
    for protocol in protocols:
        start = time.perf_counter()
        score = {"ctc-linear": _lines, "text-mask": _regions, "read-page": _pages}[protocol]
        try:
            statistics, drawn, notes = score(system, test, panels, progress)
        except DataError as error:
            if "--on-bad-image" not in error.fix:
                raise
            raise DataError(error.what, "replace the file: a reference leaves no image out") from error
        rows.append(
            _write(
                system, card, test, protocol, statistics, drawn, notes, results, resamples, time.perf_counter() - start
            )
        )
    return rows


class _Once:
    """A system that searches every page once, however many protocols score what it found."""

    def __init__(self, system: System) -> None:
        self.name, self.line = system.name, system.line
        self._system = system
        self._pages: dict[bytes, tuple[list[Polygon], list[str]]] = {}

    def page(self, image: Picture) -> tuple[list[Polygon], list[str]]:
        """See ``System``."""
        key = hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()
        if key not in self._pages:
            self._pages[key] = self._system.page(image)
        return self._pages[key]


def _lines(
    system: System, test: Dataset, panels: int, progress: Callable[[str, int], Callable[[int], None]]
) -> tuple[TextStatistics, tuple[Panel, ...], tuple[str, ...]]:
    crops = crops_of(test, 48, "fit", 0.15, 32.0)
    need_lines(crops, "test")
    scorer = LineScorer(crops, panels, False)
    advance = progress("lines", len(crops))
    for index in range(len(crops)):
        scorer.add(index, system.line(crops.image(index)[:, : crops.content_width(index)]))
        advance(1)
    statistics, drawn, _ = scorer.finish()
    return statistics, drawn, remarks(crops, "test")


def _regions(
    system: System, test: Dataset, panels: int, progress: Callable[[str, int], Callable[[int], None]]
) -> tuple[TextStatistics, tuple[Panel, ...], tuple[str, ...]]:
    scorer = MaskScorer(test, panels, False)
    advance = progress("pages", len(test))
    for index in range(len(test)):
        image = test.image(index)
        polygons, _ = system.page(image)
        mask = text_labels([TextLine(p, "") for p in polygons], (image.shape[0], image.shape[1]))
        scorer.add(index, test.text(index), mask.astype(np.float32), polygons)
        advance(1)
    statistics, drawn = scorer.finish(range(len(test)))
    return statistics, drawn, ()


def _pages(
    system: System, test: Dataset, panels: int, progress: Callable[[str, int], Callable[[int], None]]
) -> tuple[TextStatistics, tuple[Panel, ...], tuple[str, ...]]:
    scorer = PageScorer(test, panels, False)
    advance = progress("pages", len(test))
    for index in range(len(test)):
        polygons, texts = system.page(test.image(index))
        scorer.add(index, test.text(index), polygons, texts)
        advance(1)
    statistics, drawn = scorer.finish()
    return statistics, drawn, ()


def _write(
    system: System,
    card: TaskCard,
    test: Dataset,
    protocol: str,
    statistics: TextStatistics,
    drawn: tuple[Panel, ...],
    notes: tuple[str, ...],
    results: Path,
    resamples: int,
    seconds: float,
) -> Reference:
    entries = metric_entries(statistics, intervals(statistics, resamples=resamples))
    headline = cast("type[Scored]", registered.get(protocol)).metric
    if headline not in entries:
        raise DataError(
            f"task '{card.name}': '{headline}' of '{protocol}' has nothing to divide by on {len(test)} test images",
            "check that the test split is labelled",
        )
    metrics = {name: (entry.value, entry.low, entry.high) for name, entry in entries.items()}
    groups = class_entries(statistics)
    path = results / "references" / f"{card.name.replace('/', '-')}-{protocol}-{system.name}.json"
    content = {
        "reference": True,
        "system": system.name,
        "task": card.name,
        "protocol": protocol,
        "test_fingerprint": test.fingerprint,
        "n_test": len(test),
        "metrics": {name: {"value": v, "low": low, "high": high} for name, (v, low, high) in metrics.items()},
        "groups": groups,
        "group_intervals": group_intervals(statistics, list(groups), resamples),
        "seconds": round(seconds, 3),
        "warnings": list(notes),
        "note": "an OCR system, not an encoder: a ceiling beside the ranking, never in it",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    save_pictures(path, drawn, test, {}, "ocr")
    return Reference(system.name, card.name, protocol, metrics, groups, path)
