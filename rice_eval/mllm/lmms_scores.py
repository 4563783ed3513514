"""From lmms-eval's scores and its per-sample log to a record's metrics and statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rice_eval.cards import LmmsMetric, TaskCard
from rice_eval.errors import DataError
from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.mllm.lmms import LmmsRun

__all__ = ["metrics_of", "scored"]


def metrics_of(card: TaskCard, run: LmmsRun) -> tuple[LmmsMetric, ...]:
    """The card's metrics; of an embedded task all that were scored, each 0 to 1."""
    if card.lmms is not None:
        return card.lmms.metrics
    return tuple(LmmsMetric(name=name, key=name, scale=100.0) for name in sorted(run.scores))


def scored(card: TaskCard, runs: Mapping[str, LmmsRun]) -> tuple[dict[str, tuple[float, bool]], RatioStatistics | None]:
    """Metrics of every control, and per-document statistics of those that are means over documents.

    Args:
        card: of the task.
        runs: control (``""`` for none) -> run, over the same documents.

    Returns:
        name -> (value, whether it is in percent); statistics, None where no metric is a mean.

    Raises:
        DataError: lmms-eval does not report the card's metric, or the controls saw different documents.
    """
    lengths = {len(run.samples) for run in runs.values()}
    if len(lengths) != 1:
        raise DataError(f"task '{card.name}': the controls answered different documents", "run the evaluation again")
    values: dict[str, tuple[float, bool]] = {}
    columns: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for control, run in runs.items():
        for metric in metrics_of(card, run):
            name = f"{control}_{metric.name}" if control else metric.name
            if metric.key not in run.scores:
                raise DataError(
                    f"task '{card.name}': lmms-eval {run.version} reports no '{metric.key}' (it reports "
                    f"{', '.join(sorted(run.scores)) or 'nothing'})",
                    "mend the card's metrics, or choose another version",
                )
            value = run.scores[metric.key] * metric.scale
            values[name] = (value, metric.percent)
            found = [_number(sample.get(metric.key)) for sample in run.samples]
            counted = [v is not None for v in found]
            kept = [v for v in found if v is not None]
            # A mean over documents has an interval; F1, MME's pairs and the like have none here.
            if (
                metric.percent
                and kept
                and abs(float(np.mean(kept)) * metric.scale - value) < 1e-6 * max(1.0, abs(value))
            ):
                columns[name] = ([(v or 0.0) * metric.scale / 100 for v in found], [float(c) for c in counted])
    if not columns:
        return values, None
    ids = tuple(str(sample.get("doc_id", n)) for n, sample in enumerate(next(iter(runs.values())).samples))
    tops = np.array([c[0] for c in columns.values()]).T
    bottoms = np.array([c[1] for c in columns.values()]).T
    return values, RatioStatistics(ids, tops, bottoms, tuple(columns))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return float(value) if value is not None else None
    if isinstance(value, (int, float)):
        return float(value)
    return None
