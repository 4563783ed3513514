"""The gate: is this checkpoint worse than that one, beyond a margin and beyond chance?

A task fails where the drop is larger than its margin *and* the one-sided paired test, adjusted for the number of tasks, is
significant. It is warned of where the set is too small to tell. Missing or incomparable results make it unusable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from rice_eval.errors import RecordError
from rice_eval.results.compare import Pair, Resampling, Side, match, paired_of, sides
from rice_eval.results.paired import Paired, holm
from rice_eval.results.policy import Policy, unused_patterns
from rice_eval.results.store import StoredRecord

__all__ = ["GateReport", "TaskVerdict", "run_gate"]

Status = Literal["pass", "warn", "fail", "unusable"]


@dataclass(frozen=True)
class TaskVerdict:
    """What the gate says of one task.

    Attributes:
        encoder: name of the encoder.
        pair: baseline (a) and candidate (b).
        status: ``pass``, ``warn``, ``fail`` or ``unusable``.
        reason: one sentence.
        test: the paired test; None where there was none.
        p_adjusted: one-sided p, adjusted for the number of tasks.
        margin: drop that is let through.
        detectable: smallest true drop that this set and this policy see with the policy's power; infinite where none can be
            significant.
    """

    encoder: str
    pair: Pair
    status: Status
    reason: str
    test: Paired | None = None
    p_adjusted: float | None = None
    margin: float = 0.0
    detectable: float | None = None

    def plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        t = self.test
        return {
            "encoder": self.encoder,
            "task": self.pair.task,
            "protocol": self.pair.record.protocol.id,
            "metric": self.pair.record.metric,
            "status": self.status,
            "reason": self.reason,
            "baseline": None if t is None else t.a,
            "candidate": None if t is None else t.b,
            "difference": None if t is None else t.difference,
            "low": None if t is None else t.low,
            "high": None if t is None else t.high,
            "p": None if t is None else t.p_worse,
            "p_adjusted": self.p_adjusted,
            "test": None if t is None else t.test,
            "p_floor": None if t is None else t.p_floor,
            "images": None if t is None else t.images,
            "margin": self.margin,
            "detectable": None if self.detectable is None or math.isinf(self.detectable) else self.detectable,
            "notes": [] if t is None else list(t.notes),
            "baseline_records": [str(e.path) for e in self.pair.a],
            "candidate_records": [str(e.path) for e in self.pair.b],
        }


@dataclass(frozen=True)
class GateReport:
    """All verdicts.

    Attributes:
        verdicts: by encoder and task.
        policy: what they were made under.
        warnings: about the policy, one sentence each.
        problem: why nothing could be judged; empty where something was.
    """

    verdicts: tuple[TaskVerdict, ...]
    policy: Policy = field(default_factory=Policy)
    warnings: tuple[str, ...] = ()
    problem: str = ""

    def count(self, status: Status) -> int:
        """Verdicts with this status; a problem counts as one unusable."""
        return sum(v.status == status for v in self.verdicts) + (status == "unusable" and self.problem != "")

    @property
    def exit_code(self) -> int:
        """1 where a task fails, else 2 where one is unusable, else 0."""
        return 1 if self.count("fail") else 2 if self.count("unusable") else 0


def run_gate(baseline: Iterable[StoredRecord], candidate: Iterable[StoredRecord], policy: Policy) -> GateReport:
    """Judge a candidate against a baseline.

    Where each side holds one encoder, the two are paired whatever their names; else encoders are paired by name.

    Raises:
        RecordError: a side holds two sets of weights under one name; damaged statistics.
    """
    pairs = [(name, pair) for name, a, b in _encoders(sides(baseline), sides(candidate)) for pair in match(a, b)]
    if not pairs:
        raise RecordError("the baseline and the candidate hold no records", "point at two results folders")
    together = sum(not pair.problems for _, pair in pairs)
    tested = [_tested(pair, policy, together) for _, pair in pairs]
    tests = [t for t, _ in tested if t is not None]
    adjusted = iter(holm([t.p_worse for t in tests]))
    verdicts = [
        _without_test(name, pair, problem, policy)
        if test is None
        else _judge(name, pair, test, next(adjusted), len(tests), policy)
        for (name, pair), (test, problem) in zip(pairs, tested)
    ]
    return GateReport(tuple(verdicts), policy, tuple(unused_patterns(policy, [p.task for _, p in pairs])))


def _tested(pair: Pair, policy: Policy, together: int) -> tuple[Paired | None, str]:
    if pair.problems:
        return None, "; ".join(pair.problems)
    tests = Resampling(policy.resamples, policy.permutations, policy.seed, policy.alpha)
    try:
        test, _, _ = paired_of(pair, tests, together)
    except RecordError as error:
        return None, str(error)
    if test is None:
        return None, "a record has no per-image statistics, so nothing can be tested"
    if test.images < 2:
        return None, "the set holds one image, so nothing can be tested"
    if not math.isfinite(test.se) or not math.isfinite(test.difference):
        return None, "the metric is undefined on most resamples of this set"
    return test, ""


def _encoders(baseline: list[Side], candidate: list[Side]) -> list[tuple[str, Side, Side]]:
    if len(baseline) == len(candidate) == 1:
        return [(candidate[0].label, baseline[0], candidate[0])]
    for side, found in (("baseline", baseline), ("candidate", candidate)):
        names = [s.records[0].record.encoder.name for s in found]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise RecordError(
                f"the {side} holds several sets of weights of encoder '{twice[0]}'",
                "point at a folder with one of them",
            )
    theirs = {s.label: s for s in candidate}
    mine = {s.label: s for s in baseline}
    empty = {name: Side(name, ()) for name in {*mine, *theirs}}
    # An encoder that is new in the candidate has no baseline to fall from: it is not judged.
    return [(name, side, theirs.get(name, empty[name])) for name, side in sorted(mine.items())]


def _without_test(name: str, pair: Pair, problem: str, policy: Policy) -> TaskVerdict:
    own = policy.of(pair.task)
    if not pair.a:
        return TaskVerdict(name, pair, "warn", f"not in the baseline: {problem}", margin=own.margin or 0.0)
    status: Status = "unusable" if own.required else "warn"
    return TaskVerdict(name, pair, status, problem, margin=own.margin or 0.0)


def _judge(name: str, pair: Pair, test: Paired, p: float, tests: int, policy: Policy) -> TaskVerdict:
    own = policy.of(pair.task)
    margin = own.margin or 0.0
    # Under Holm a single bad task among `tests` has to pass alpha / tests.
    detectable = test.detectable(margin, policy.alpha / tests, policy.power)
    unit = "" if pair.info.unit == "" else " points" if pair.info.unit == "%" else f" {pair.info.unit}"
    drop = f"{abs(test.drop):.3g}{unit} {'worse' if test.drop > 0 else 'better'}" if test.drop else "no change"
    status: Status = "pass"
    reason = f"{drop} (p = {p:.3g})"
    if test.drop > margin and p <= policy.alpha:
        status, reason = "fail", f"{reason}, beyond the margin of {margin:g}"
    elif math.isinf(detectable):
        status = "warn"
        reason = f"{reason}: no drop can fail this task, as {_floor(test, tests, policy)}"
    elif test.drop > margin and test.drop > 0:
        status, reason = "warn", f"{reason}: beyond the margin of {margin:g}, but this set can't tell it from chance"
        if margin == 0.0 and own.detect is None:
            # Without a margin every second equal pair lies below zero: that alone is worth no warning.
            status, reason = "pass", f"{drop} (p = {p:.3g}): within chance"
    if status != "fail" and own.detect is not None and own.detect < detectable < math.inf:
        status = "warn"
        reason = f"{drop} (p = {p:.3g}): the smallest drop this set can see is {detectable:.3g}{unit}, above the wanted {own.detect:g}"
    reason = "; ".join([reason, *test.notes])
    return TaskVerdict(name, pair, status, reason, test, p, margin, detectable)


def _floor(test: Paired, tests: int, policy: Policy) -> str:
    """Why a task can't fail, and what would let it."""
    shared = f"{policy.alpha:g}" if tests == 1 else f"{policy.alpha:g} / {tests} tasks"
    few = test.p_floor <= 1.01 * 0.5**test.images
    fix = "more images" if few else f"permutations: {math.ceil(tests / policy.alpha) * 10}"
    return f"p can't get below {test.p_floor:.2g} here and alpha is {shared}; {fix} or a larger alpha would let it"
