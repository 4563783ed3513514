"""Roboflow 100 as one benchmark: every set of a copy, a mean a category, and the mean of the categories."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rice_eval.datasets.roboflow import categories, survey
from rice_eval.errors import DataError, PlanError
from rice_eval.results.store import write_output
from rice_eval.run import Result, evaluate

__all__ = ["Suite", "category_means", "run_roboflow100"]


@dataclass
class Suite:
    """What came of the hundred sets.

    Attributes:
        scores: (encoder, protocol) -> set -> headline metric.
        broken: set -> what is wrong with it, in one line.
        absent: sets that a copy in a folder does not have at all.
        results: every record, in the order of the sets.
    """

    scores: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    results: list[Result] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """A line for each encoder and protocol: its sets, a mean a category and their mean."""
        out = []
        for (encoder, protocol), scores in self.scores.items():
            means = category_means(scores)
            out.append({"encoder": encoder, "protocol": protocol, "sets": len(scores), **means})
        return sorted(out, key=lambda row: -float(row["mean"]))

    def save(self, path: Path) -> Path:
        """Write means, every set's score and the broken sets as JSON; returns the path."""
        scores = [{"encoder": e, "protocol": p, "sets": sets} for (e, p), sets in self.scores.items()]
        facts = {"means": self.rows(), "scores": scores, "broken": self.broken, "absent": self.absent}
        text = json.dumps(facts, indent=2, sort_keys=True)
        write_output(path, f"{text}\n".encode())
        return path


def category_means(scores: Mapping[str, float]) -> dict[str, float]:
    """category -> plain mean over its sets that have a score, and ``mean``: the plain mean of those means (as RICE's Table 3)."""
    out = {}
    for category, names in categories().items():
        mine = [scores[name] for name in names if name in scores]
        if mine:
            out[category] = float(np.mean(mine))
    return {**out, "mean": float(np.mean(list(out.values()))) if out else float("nan")}


def run_roboflow100(
    encoders: Sequence[str],
    *,
    data: Path | None,
    said: Callable[[str], None] = lambda line: None,
    **arguments: Any,
) -> Suite:
    """Evaluate encoders on every set of a copy; a broken set is reported by name and the rest goes on.

    Args:
        encoders, arguments: as for ``rice_eval.run.evaluate``.
        data: the copy.
        said: called with a line for each broken set.

    Raises:
        DataError: no set of the copy can be read.
        RiceEvalError: what would stop every set alike (a flag, an encoder).
    """
    found = survey(data, ("train", "test"))
    there = {path.name for path in data.iterdir()} if data is not None and data.is_dir() else set()
    zipped = not any(name in there for names in categories().values() for name in names)
    suite = Suite(
        broken={name: str(error) for name, error in found.broken.items() if zipped or name in there},
        absent=() if zipped else tuple(name for name in found.broken if name not in there),
    )
    if suite.absent:
        said(f"roboflow100: {len(suite.absent)} of the hundred sets are not in {data}: {', '.join(suite.absent)}")
    options = dict(arguments.pop("options", {}))
    for name, line in suite.broken.items():
        said(f"roboflow100, set {name}: {line}")
    for name in [name for names in found.usable.values() for name in names]:
        try:
            results = evaluate(
                encoders,
                dataset="roboflow100",
                kind="detection",
                data=data,
                options={**options, "set": name},
                **arguments,
            )
        except (DataError, PlanError) as error:
            if isinstance(error, PlanError) and not suite.results:
                raise  # nothing went through yet: the plan is wrong, not this set
            suite.broken[name] = str(error)
            said(f"roboflow100, set {name}: {error}")
            continue
        suite.results += results
        for result in results:
            record = result.record
            key = (record.encoder.name, record.protocol.id)
            suite.scores.setdefault(key, {})[name] = record.metrics[record.metric].value
    if not suite.results:
        raise DataError("roboflow100: no set could be scored", "see the lines above")
    return suite
