"""Records of a run on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rice_eval.results.record import Metric, Record
    from rice_eval.run import Result

__all__ = ["show_results"]

_WIDE = 14  # metrics: with more of them, a table has a row for each instead of a column


def _row(record: Record) -> dict[str, Any]:
    """One record: its main metric first, the others, and what it took."""
    named = sorted(record.metrics.items(), key=lambda item: item[0] != record.metric)
    return {"encoder": record.encoder.name, **{name: _with_interval(m) for name, m in named}, **_cost(record)}


def _by_metric(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each metric, a column for each record, and one beside it for each of its controls."""
    from rice_eval.mllm.judge import CONTROLS

    controls = [control for control in CONTROLS if control]
    first = records[0]
    named = sorted(first.metrics, key=lambda name: name != first.metric)
    mirrored = {f"{control}_{name}" for control in controls for name in named}
    rows = []
    for name in named:
        if name in mirrored:
            continue
        row: dict[str, Any] = {"metric": name}
        for record in records:
            row[record.encoder.name] = _with_interval(record.metrics[name])
            for control in controls:
                if f"{control}_{name}" in record.metrics:
                    row[f"{control} ({record.encoder.name})"] = _with_interval(record.metrics[f"{control}_{name}"])
        rows.append(row)
    costs = {record.encoder.name: _cost(record) for record in records}
    return rows + [{"metric": key, **{name: cost[key] for name, cost in costs.items()}} for key in _cost(first)]


def _with_interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return f"{metric.value:.2f}"
    return f"{metric.value:.2f} [{metric.low:.1f}, {metric.high:.1f}]"


def _cost(record: Record) -> dict[str, Any]:
    layers = ",".join(map(str, record.layers))
    return {"layers": layers, "seconds": f"{record.seconds['total']:.1f}", "forwards": record.cost.forwards}


def show_results(results: list[Result], as_json: bool) -> None:
    """Print records: one table a comparability key, or JSON lines."""
    if as_json:
        for result in results:
            line = {
                "encoder": result.record.encoder.name,
                "task": result.record.task.name,
                "protocol": result.record.protocol.id,
                "metric": result.record.metric,
                "metrics": {name: m.model_dump() for name, m in result.record.metrics.items()},
                "key": result.record.comparability_key,
                "record": str(result.path),
            }
            typer.echo(json.dumps(line, sort_keys=True))
        return
    from rice_eval.cli.tables import print_table

    by_key: dict[str, list[Result]] = {}
    for result in results:
        by_key.setdefault(result.record.comparability_key, []).append(result)
    for group in by_key.values():
        first = group[0].record
        best_first = first.metrics[first.metric].higher_is_better
        group.sort(key=lambda r: r.record.metrics[r.record.metric].value, reverse=best_first)
        records = [r.record for r in group]
        alone = len({record.encoder.name for record in records}) == len(records)
        long = alone and len(first.metrics) > _WIDE
        rows = _by_metric(records) if long else [_row(record) for record in records]
        print_table(rows, title=f"{first.task.name} · {first.protocol.id} · {first.view}")
        for r in group:
            if r.record.skipped:
                named = ", ".join(r.record.skipped[:3]) + (", …" if len(r.record.skipped) > 3 else "")
                typer.echo(f"{r.record.encoder.name}: {len(r.record.skipped)} unreadable images were left out: {named}")
        typer.echo()
