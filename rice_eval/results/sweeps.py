"""Curves of a metric against the share of labels, the layer, or the tokens an image has, from records."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction

from rice_eval.results.record import HeadScore, Record, canonical_json

__all__ = ["KINDS", "SweepPoint", "layer_scores", "share", "sweep_csv", "sweep_family", "sweep_json", "sweep_points"]

KINDS = {"labels": "share of labels", "layers": "layer", "resolution": "tokens an image"}
"""Sweeps and what lies along them."""


@dataclass(frozen=True)
class SweepPoint:
    """One value of a curve.

    Attributes:
        sweep: ``labels``, ``layers`` or ``resolution``.
        task, protocol, encoder, view: what was run.
        metric: ``value``'s name; a sweep over layers shows scores on the held-out part of train, named ``held-out METRIC``.
        x: share of the labels in (0, 1], layer from 1, or tokens an image.
        name: ``x`` as the run was told: ``1/64``, ``6``, ``square=448``.
        value: mean over ``runs`` seeds.
        sd: their standard deviation; None for one run.
    """

    sweep: str
    task: str
    protocol: str
    encoder: str
    view: str
    metric: str
    x: float
    name: str
    value: float
    sd: float | None
    runs: int


def share(record: Record) -> Fraction:
    """The share of training labels a record's protocol read."""
    labels = str(record.protocol.settings.get("labels", "all"))
    return Fraction(1) if labels == "all" else Fraction(labels)


def layer_scores(heads: Sequence[HeadScore]) -> dict[int, float]:
    """layer -> best held-out score of the heads that read it alone, by layer."""
    best: dict[int, float] = {}
    for head in heads:
        layer = head.settings.get("layer", head.settings.get("layers"))
        if isinstance(layer, (list, tuple)) and len(layer) == 1:
            layer = layer[0]
        if isinstance(layer, int) and not isinstance(layer, bool) and head.score is not None:
            best[layer] = max(head.score, best.get(layer, head.score))
    return dict(sorted(best.items()))


def sweep_family(record: Record, *free: str) -> str:
    """Records that share this differ in these fields of the protocol, and in the seed, alone."""
    facts = {k: v for k, v in record.comparability().items() if k != "protocol hash"}
    settings = {k: v for k, v in record.protocol.settings.items() if k not in (*free, "seed")}
    return canonical_json([facts, record.protocol.version, settings])


def sweep_points(records: Iterable[Record], kind: str) -> list[SweepPoint]:
    """Every curve of a kind with more than one place on it.

    Args:
        records: any; those that are on no curve are passed over. Of two that agree in all but the time, the later counts.
        kind: one of ``KINDS``.
    """
    latest = {r.identity: r for r in sorted(records, key=lambda r: r.created)}
    free = {"labels": ("labels",), "layers": (), "resolution": ("view",)}[kind]
    curves: dict[tuple[str, str, str], dict[tuple[float, str], list[tuple[float, Record]]]] = {}
    for record in latest.values():
        curve = curves.setdefault((sweep_family(record, *free), record.encoder.name, record.encoder.sha256), {})
        for place, value in _PLACES[kind](record):
            curve.setdefault(place, []).append((value, record))
    points = []
    for curve in curves.values():
        if len(curve) < 2:
            continue
        for (x, name), found in curve.items():
            values, record = [v for v, _ in found], found[0][1]
            points.append(
                SweepPoint(
                    sweep=kind,
                    task=record.task.name,
                    protocol=record.protocol.id,
                    encoder=record.encoder.name,
                    view=record.view,
                    metric=f"held-out {record.metric}" if kind == "layers" else record.metric,
                    x=x,
                    name=name,
                    value=statistics.fmean(values),
                    sd=statistics.stdev(values) if len(values) > 1 else None,
                    runs=len(values),
                )
            )
    return sorted(points, key=lambda p: (p.task, p.protocol, p.encoder, p.x))


Places = list[tuple[tuple[float, str], float]]


def _label_places(record: Record) -> Places:
    part = share(record)
    return [((float(part), "all" if part == 1 else str(part)), record.headline.value)]


def _layer_places(record: Record) -> Places:
    return [((float(layer), str(layer)), score) for layer, score in layer_scores(record.heads).items()]


def _view_places(record: Record) -> Places:
    return [((record.cost.tokens_per_image, record.view), record.headline.value)]


_PLACES: dict[str, Callable[[Record], Places]] = {
    "labels": _label_places,
    "layers": _layer_places,
    "resolution": _view_places,
}


def sweep_csv(points: Sequence[SweepPoint]) -> str:
    """A header and a line a point."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(SweepPoint)], lineterminator="\n")
    writer.writeheader()
    for point in points:
        writer.writerow({k: "" if v is None else v for k, v in asdict(point).items()})
    return out.getvalue()


def sweep_json(points: Sequence[SweepPoint]) -> str:
    """A JSON object a line."""
    return "".join(json.dumps(asdict(p), sort_keys=True) + "\n" for p in points)
