"""What statistics become in a record."""

from __future__ import annotations

from collections.abc import Mapping

from rice_eval.metrics.statistics import METRICS, MetricInfo, Statistics
from rice_eval.results.record import Metric

__all__ = ["class_entries", "metric_entries"]


def metric_entries(statistics: Statistics, bounds: Mapping[str, tuple[float, float]]) -> dict[str, Metric]:
    """Metrics with the ends of their intervals; those with nothing to divide by on this set are left out."""
    out = {}
    for name, value in statistics.point().items():
        if value != value:
            continue
        info = METRICS.get(name, MetricInfo(name))
        low, high = bounds.get(name, (None, None))
        out[name] = Metric(
            value=value,
            low=low if low is not None and low == low else None,
            high=high if high is not None and high == high else None,
            unit=info.unit,
            higher_is_better=info.higher_is_better,
        )
    return out


def class_entries(statistics: Statistics) -> dict[str, dict[str, float | None]]:
    """metric -> class -> value, None where the class does not occur."""
    return {
        metric: {name: (value if value == value else None) for name, value in values.items()}
        for metric, values in statistics.per_class().items()
    }
