"""Sweeps from one bank: shares of the labels, layers, resolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rice_eval.errors import UsageError
from rice_eval.plan import Plan
from rice_eval.progress import progress
from rice_eval.protocols.base import Protocol, configure
from rice_eval.results.sweeps import KINDS
from rice_eval.run import Executor, Result, RunOptions, execute, plan_of

__all__ = ["DEFAULTS", "sweep"]

DEFAULTS: dict[str, tuple[str, ...]] = {
    "labels": ("1/128", "1/64", "1/8", "all"),
    "layers": ("all",),
    "resolution": ("square=16p", "square=24p", "square=32p"),
}
"""What each sweep runs over: shares of the training labels, a set of layers, views."""


def sweep(
    kind: str,
    encoders: Sequence[str],
    values: Sequence[str] = (),
    *,
    seeds: int = 5,
    protocols: Sequence[str] = ("linear",),
    settings: Mapping[str, Any] | None = None,
    view: str | None = None,
    results: str | Path = "results",
    show_progress: bool | None = None,
    executor: Executor | None = None,
    run_options: Mapping[str, Any] | None = None,
    **data: Any,
) -> list[Result]:
    """Run a sweep: one record a value, seed, protocol and encoder, all from the passes that one of them needs.

    ``labels`` trains on fixed splits (see ``rice_eval.protocols.labels.labelled_images``), split k with seed k, and on all images with the
    first seed; the bank of the whole training set serves them all. ``layers`` is one run whose record has a score of every layer on
    the held-out part of train. ``resolution`` is a run a view; each view has a pass of its own.

    Args:
        kind: ``labels``, ``layers`` or ``resolution``.
        encoders: registry names.
        values: shares, one set of layers, or views; ``DEFAULTS`` where empty.
        seeds: splits of each share; 1 for the other sweeps.
        protocols: ``linear``, ``gram-lda`` or ``gram-ridge`` for labels and layers; any that has a view for resolutions.
        settings: further fields of the protocols.
        view: for labels and layers.
        results: folder that records go to; ``rice_eval.results.sweeps`` makes curves of them.
        show_progress, executor: see ``rice_eval.evaluate``.
        run_options: fields of ``RunOptions``.
        **data: what ``rice_eval.evaluate`` takes to find the data: ``tasks`` or ``dataset``, ``data``, ``options``, ``limit_train``, ….

    Returns:
        One result a run.

    Raises:
        UsageError: a sweep that is not known, or values that make no sense for it.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no sweep over '{kind}'", f"choose {', '.join(KINDS)}")
    chosen = tuple(values) or DEFAULTS[kind]
    if seeds < 1 or len(set(chosen)) != len(chosen):
        raise UsageError("a sweep needs at least one seed, and each value once", "see rice-eval sweep --help")
    if kind == "resolution" and view is not None:
        raise UsageError("a sweep over resolutions has no --view of its own", "give the views as its values")
    views = chosen if kind == "resolution" else (view,)
    plans = [plan_of(encoders, protocols=protocols, view=at, settings=settings, **data) for at in views]
    changes: list[dict[str, Any]] = [{}]
    if kind == "labels":
        changes = [{"labels": v, "seed": k} for v in chosen for k in range(1 if v == "all" else seeds)]
    elif kind == "layers":
        changes = [{"layer_set": v} for v in chosen]
    jobs = [replace(job, protocol=_changed(job.protocol, c)) for plan in plans for job in plan.jobs for c in changes]
    order = {job.encoder: number for number, job in reversed(list(enumerate(plans[0].jobs)))}
    # By encoder, so that each is loaded once and its passes are shared.
    jobs.sort(key=lambda job: order[job.encoder])
    plan = replace(plans[0], jobs=tuple(jobs), datasets={k: v for p in plans for k, v in p.datasets.items()})
    how = RunOptions(results=Path(results), **(run_options or {}))
    with progress(show_progress) as report:
        return (executor or execute)(_checked(plan), how, report)


def _changed(protocol: Protocol, changes: Mapping[str, Any]) -> Protocol:
    """The protocol with some fields changed; UsageError where it has no such field."""
    known = {f.name: getattr(protocol, f.name) for f in fields(protocol) if f.init}
    return configure(type(protocol), {**known, **changes}) if changes else protocol


def _checked(plan: Plan) -> Plan:
    """Refuse sweeps that would write one record twice."""
    seen = [(job.encoder, job.task.card.name, job.protocol) for job in plan.jobs]
    if len(set(seen)) != len(seen):
        raise UsageError("two runs of the sweep are the same", "give each value once, and no setting that fixes it")
    return plan
