"""Averages over benchmarks, always from cells: the formulas of the RICE paper's main table.

The caption of Table 1 (arXiv 2507.20025v1) scales the cells that are no percentages before the mean is taken: OCRBench's
thousand by 10, MME's cognition score (800 at most) by 8, its perception score (2000) by 20. The averages printed in the same
table come out with cognition divided by 6. Where the authors print the table again (LLaVA-OneVision-1.5, arXiv 2509.23661v3,
Table 2), its averages follow the caption, over cells rounded to one decimal. Both sets of printed averages are kept with their
sources in ``results/published`` and stand beside the recomputed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rice_eval.errors import NotFoundError
from rice_eval.registry import did_you_mean
from rice_eval.results.published import Reference, load_published
from rice_eval.results.store import iter_records

__all__ = [
    "GROUPS",
    "PRINTED_RULE",
    "Cell",
    "Group",
    "TableRow",
    "average",
    "averages_of_records",
    "group",
    "table_1",
]


@dataclass(frozen=True)
class Cell:
    """One benchmark of a group.

    Attributes:
        task: name of the task card.
        metric: the card's metric.
        printed: what the paper's table calls it.
        divide: what the cell is divided by to be of 0 to 100.
    """

    task: str
    metric: str
    printed: str
    divide: float = 1.0


@dataclass(frozen=True)
class Group:
    """Benchmarks whose scaled cells are averaged plainly."""

    name: str
    title: str
    cells: tuple[Cell, ...]


GROUPS: dict[str, Group] = {
    "rice-ocr-avg": Group(
        "rice-ocr-avg",
        "OCR and documents (RICE, Table 1)",
        (
            Cell("mllm/infovqa", "anls", "InfoVQA"),
            Cell("mllm/docvqa", "anls", "DocVQA"),
            Cell("mllm/chartqa", "relaxed_accuracy", "ChartQA"),
            Cell("mllm/textvqa", "vqa_accuracy", "TextVQA"),
            Cell("mllm/ocrbench", "ocrbench_score", "OCRBench", 10.0),
            Cell("mllm/ocrbench-v2", "accuracy", "OCRBenchV2"),
            Cell("mllm/livexiv-vqa", "accuracy", "LiveXivVQA"),
        ),
    ),
    "rice-other-avg": Group(
        "rice-other-avg",
        "General understanding (RICE, Table 1)",
        (
            Cell("mllm/ai2d", "accuracy", "AI2D"),
            Cell("mllm/mmbench-en", "accuracy", "MMB_EN"),
            Cell("mllm/mme", "mme_cognition", "MME_Cog", 8.0),
            Cell("mllm/mme", "mme_perception", "MME_Per", 20.0),
            Cell("mllm/pope", "f1", "POPE"),
            Cell("mllm/realworldqa", "accuracy", "RealWorldQA"),
            Cell("mllm/mmstar", "accuracy", "MMStar"),
        ),
    ),
}
"""Groups by name, in the order of the table's columns."""

PRINTED_RULE = {"MME_Cog": 6.0}
"""Where the paper's printed averages divide by another number than its caption says."""

_CELLS, _PRINTED, _REPRINTED = "rice-table-1.csv", "rice-table-1-averages.csv", "llava-onevision-1.5-table-2.csv"


def group(name: str) -> Group:
    """The group ``name``; NotFoundError with close names otherwise."""
    if name not in GROUPS:
        raise NotFoundError(f"no group of benchmarks is named '{name}'", did_you_mean(name, GROUPS))
    return GROUPS[name]


def average(
    chosen: Group, cells: Mapping[tuple[str, str], float], divide: Mapping[str, float] | None = None
) -> float | None:
    """The mean of a group's scaled cells.

    Args:
        chosen: the group.
        cells: ``(task, metric)`` -> value in the benchmark's own unit.
        divide: printed name -> divisor that replaces the caption's.

    Returns:
        0 to 100; None where a cell is missing, since an average over fewer benchmarks is another number.
    """
    total = 0.0
    for cell in chosen.cells:
        value = cells.get((cell.task, cell.metric))
        if value is None:
            return None
        total += value / (divide or {}).get(cell.printed, cell.divide)
    return total / len(chosen.cells)


@dataclass(frozen=True)
class TableRow:
    """A row of the paper's table: who, its averages recomputed from the printed cells, and the averages that are printed.

    Attributes:
        encoder, arch, resolution, protocol: as printed.
        ocr, other: recomputed by the caption's formula.
        other_printed_rule: recomputed by the rule of the table's own averages (``PRINTED_RULE``).
        ocr_printed, other_printed: in the paper's columns OCRAvg and OtherAvg.
        ocr_reprinted, other_reprinted: in Table 2 of the LLaVA-OneVision-1.5 paper, one decimal; None where it has no such row.
    """

    encoder: str
    arch: str
    resolution: int | None
    protocol: str
    ocr: float
    other: float
    other_printed_rule: float
    ocr_printed: float | None
    other_printed: float | None
    ocr_reprinted: float | None
    other_reprinted: float | None


def table_1(published: Iterable[Reference] | None = None) -> list[TableRow]:
    """Every complete row of RICE's Table 1, in the table's order: averages recomputed from its cells beside printed ones."""
    rows: dict[tuple[str, str, int | None, str], dict[str, float]] = {}
    averages: dict[tuple[tuple[str, str, int | None, str], str, str], float] = {}
    for reference in published if published is not None else load_published():
        key = (reference.encoder, reference.arch, reference.resolution, reference.protocol)
        if reference.file == _CELLS:
            rows.setdefault(key, {})[reference.benchmark] = reference.value
        elif reference.file in (_PRINTED, _REPRINTED):
            averages[key, reference.file, reference.benchmark] = reference.value
    out = []
    for key, printed in rows.items():
        means = {}
        for name, rule in (("rice-ocr-avg", None), ("rice-other-avg", None), ("rice-other-avg", PRINTED_RULE)):
            cells = {(c.task, c.metric): printed[c.printed] for c in GROUPS[name].cells if c.printed in printed}
            means[name, rule is not None] = average(GROUPS[name], cells, rule)
        ocr, other, by_six = means["rice-ocr-avg", False], means["rice-other-avg", False], means["rice-other-avg", True]
        if ocr is not None and other is not None and by_six is not None:
            told = [averages.get((key, file, b)) for file in (_PRINTED, _REPRINTED) for b in ("OCRAvg", "OtherAvg")]
            out.append(TableRow(*key, ocr, other, by_six, *told))
    return out


def averages_of_records(results: Path) -> list[dict[str, Any]]:
    """Averages of the models whose records lie in ``results``, one row a model, from its cells; None where one is missing.

    A model is an encoder with its language model, tiles and tuned parts: cells of different models are never mixed.
    """
    models: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    for stored in iter_records([results]):
        record = stored.record
        if record.task.kind != "mllm":
            continue
        told = record.protocol.settings
        tuned = "+".join(map(str, told.get("tuned", ())))
        key = (record.encoder.name, str(told.get("lm_files", told.get("lm", ""))), tuned)
        for name, metric in record.metrics.items():
            models.setdefault(key, {})[record.task.name, name] = metric.value
    return [
        {
            "encoder": encoder,
            "language model": lm[:12],
            "tuned": tuned,
            **{name: None if (mean := average(one, cells)) is None else round(mean, 2) for name, one in GROUPS.items()},
        }
        for (encoder, lm, tuned), cells in sorted(models.items())
    ]
