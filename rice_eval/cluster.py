"""``--executor ray``: the shards of every pass and the jobs of the matrix as Ray tasks.

Nothing travels between machines but the plan: tokens go into the bank and records into the results folder, both on a file
system that all machines share. A task that dies with its machine is started again elsewhere and costs one shard.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from rice_eval.bank.store import Bank, default_bank_root
from rice_eval.errors import MissingExtraError, PlanError, RiceEvalError, UsageError
from rice_eval.plan import EncoderRef, Job, Plan
from rice_eval.progress import Reporter, silent
from rice_eval.run import Elsewhere, Loaded, Result, RunOptions, SourceKey, check_loaded, execute, load, open_sources

__all__ = ["RayOptions", "execute_on_ray"]

_RETRIES = 8
"""How often a task is started again after its worker or machine was lost; errors of our own are never retried."""

_PATIENCE = 600.0
"""Seconds that a running cluster is given to bring up a machine that can take our tasks; one started here never does."""

_LOOK = 5.0
"""Seconds between two looks at whether any machine can take a task, while none ends."""


@dataclass(frozen=True)
class RayOptions:
    """What to ask of the cluster.

    Attributes:
        address: of a running cluster (``auto``, ``ray://host:port``, ``host:port``); None starts one on this machine.
        cpus: cores a task; torch uses as many threads.
        gpus: GPUs a task; None asks for one where the run's device is CUDA.
        memory_gb: main memory a task, in GB; None asks for none.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float | None = None
    memory_gb: float | None = None


@dataclass(frozen=True)
class _Survey:
    """What one encoder's jobs have to make: missing shards of each source, with their images."""

    missing: Mapping[SourceKey, Mapping[int, int]]
    first_reader: Mapping[SourceKey, int]


@dataclass(frozen=True)
class _Made:
    """A shard that is there now: what it cost this task, and what the record must say."""

    key: SourceKey
    images: int
    cost: Elsewhere


def execute_on_ray(
    plan: Plan,
    options: RunOptions,
    report: Reporter,
    done: Callable[[Result], None] | None = None,
    ray_options: RayOptions | None = None,
) -> list[Result]:
    """Run every job of a plan on a Ray cluster; same records as ``rice_eval.run.execute``.

    Args:
        plan: from ``make_plan``; its datasets, cards and folders must exist on every machine.
        options: how to run; ``results`` and ``bank`` must lie on a file system that all machines share.
        report: progress bars, fed from all machines.
        done: called with each result as it is finished.
        ray_options: what to ask of the cluster.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: no cluster at the address.
        PlanError: nothing is to be stored (shards could not be shared), no machine has what a task asks for, or workers die
            again and again.
        RiceEvalError: what a task found wrong.
    """
    asked = ray_options or RayOptions()
    if not options.store:
        raise PlanError("--executor ray shares tokens through the bank", "leave out --no-store")
    options = replace(
        options,
        results=options.results.absolute(),
        bank=(options.bank or default_bank_root()).absolute(),
        predictions=options.predictions.absolute() if options.predictions is not None else None,
    )
    wants = _resources(asked, options)
    with _connected(asked) as ray:
        cluster = _Cluster(ray, wants, 0.0 if asked.address is None else _PATIENCE)
        tasks = {
            name: ray.remote(**wants)(function)
            for name, function in (("survey", _survey), ("shard", _shard), ("job", _job))
        }
        groups = [(ref, list(jobs)) for ref, jobs in groupby(plan.jobs, key=lambda job: job.encoder)]
        plans = [ray.put(_part(plan, jobs)) for _, jobs in groups]
        how = ray.put((uuid.uuid4().hex, options))
        surveys: list[_Survey] = cluster.gather([tasks["survey"].remote(part, how) for part in plans])
        made = _passes(cluster, tasks["shard"], groups, plans, how, surveys, report)
        return _jobs(cluster, tasks["job"], plan, groups, how, surveys, made, report, done)


def _passes(
    cluster: _Cluster,
    task: Any,
    groups: list[tuple[EncoderRef, list[Job]]],
    plans: list[Any],
    how: Any,
    surveys: list[_Survey],
    report: Reporter,
) -> list[dict[SourceKey, Elsewhere]]:
    """Every missing shard of every pass; returns what they cost, by encoder and source."""
    owner: dict[Any, int] = {}
    bars = {}
    for place, survey in enumerate(surveys):
        total = sum(sum(shards.values()) for shards in survey.missing.values())
        if total:
            bars[place] = report(str(groups[place][0]), total)
        for key, shards in survey.missing.items():
            for number in shards:
                owner[task.remote(plans[place], how, key, number)] = place
    sums: list[dict[SourceKey, Elsewhere]] = [{} for _ in surveys]
    for reference, shard in cluster.as_they_end(list(owner)):
        place = owner[reference]
        sums[place][shard.key] = _plus(sums[place].get(shard.key, Elsewhere()), shard.cost)
        bars[place](shard.images)
    return sums


def _jobs(
    cluster: _Cluster,
    task: Any,
    plan: Plan,
    groups: list[tuple[EncoderRef, list[Job]]],
    how: Any,
    surveys: list[_Survey],
    made: list[dict[SourceKey, Elsewhere]],
    report: Reporter,
    done: Callable[[Result], None] | None,
) -> list[Result]:
    """Every job; its tokens are in the bank now."""
    order: dict[Any, int] = {}
    for place, (_, jobs) in enumerate(groups):
        for number, job in enumerate(jobs):
            # As in a local run, the first job that reads a source has its pass in the record.
            mine = {k: v for k, v in made[place].items() if surveys[place].first_reader[k] == number}
            order[task.remote(_part(plan, [job]), how, mine)] = len(order)
    results: list[Result | None] = [None] * len(order)
    advance = report("jobs", len(order))
    for reference, result in cluster.as_they_end(list(order)):
        results[order[reference]] = result
        advance(1)
        if done is not None:
            done(result)
    return [r for r in results if r is not None]


def _plus(one: Elsewhere, other: Elsewhere) -> Elsewhere:
    notes = tuple(dict.fromkeys([*one.notes, *other.notes]))
    return Elsewhere(one.forwards + other.forwards, one.seconds + other.seconds, notes)


def _part(plan: Plan, jobs: list[Job]) -> Plan:
    """The plan of some jobs, with the datasets that they read."""
    tasks = {job.task.card.name for job in jobs}
    return replace(
        plan, jobs=tuple(jobs), datasets={key: data for key, data in plan.datasets.items() if key[0] in tasks}
    )


# ---- what runs on the workers

How = tuple[str, RunOptions]
"""A name of this run, and how it runs."""

_LOADED: dict[tuple[str, EncoderRef], Loaded] = {}
"""The encoder this worker has in memory; workers serve many tasks, and most of them want the same one."""


def _sources(plan: Plan, how: How) -> Loaded:
    run, options = how
    key = (run, plan.jobs[0].encoder)
    if key not in _LOADED:
        _LOADED.clear()  # one encoder at a time fits any machine that fits the largest
        loaded = load(plan.jobs[0].encoder, plan, options)
        for job in plan.jobs:
            check_loaded(job, loaded.encoder, plan)
        open_sources(loaded, plan.jobs, plan, _bank(options), options, silent)
        _LOADED[key] = loaded
    return _LOADED[key]


def _bank(options: RunOptions) -> Bank:
    return Bank(options.bank or default_bank_root())


def _survey(plan: Plan, how: How) -> _Survey:
    """What is missing for the jobs of one encoder."""
    loaded = _sources(plan, how)
    missing = {
        key: {number: source.images_of(number) for number in source.missing} for key, source in loaded.sources.items()
    }
    first: dict[SourceKey, int] = {}
    for number, job in enumerate(plan.jobs):
        part = Loaded(loaded.encoder, 0.0, {})
        open_sources(part, [job], plan, None, how[1], silent)
        for key in part.sources:
            first.setdefault(key, number)
    return _Survey(missing, first)


def _shard(plan: Plan, how: How, key: SourceKey, number: int) -> _Made:
    """Make one shard, unless it is there already."""
    source = _sources(plan, how).sources[key]
    forwards, seconds = source.forwards, source.seconds
    source.extract((number,))
    # No forward here although it was missing: the machine that made the shard was lost before it could say so.
    count = source.forwards - forwards or source.stored_in(number)
    cost = Elsewhere(count, source.seconds - seconds, source.notes)
    return _Made(key, source.images_of(number), cost)


def _job(plan: Plan, how: How, elsewhere: Mapping[SourceKey, Elsewhere]) -> Result:
    """Run one job on the tokens in the bank."""
    (result,) = execute(plan, how[1], silent, elsewhere=elsewhere)
    return result


# ---- Ray


@contextmanager
def _connected(asked: RayOptions) -> Iterator[Any]:
    """Ray, connected; a cluster that was started here is stopped at the end, one that ran already goes on."""
    # One user's machines, one run: no token has to be shared first, and nothing is reported to anybody.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError.of("ray", "cluster", "--executor ray") from error
    if asked.address is not None and not asked.address.strip():
        # An unset variable of a script, most likely: a cluster of one machine must not stand in for the one that was meant.
        raise UsageError(
            "--address is empty", "give auto or HOST:PORT, or leave it out to start a cluster on this machine"
        )
    connected = ray.is_initialized()
    if not connected:
        extra: dict[str, Any] = {} if asked.address else {"include_dashboard": False}
        try:
            _knock(asked.address)
            ray.init(address=asked.address or "local", log_to_driver=False, logging_level="ERROR", **extra)
        except (OSError, ValueError, RuntimeError) as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            if asked.address is None:
                raise UsageError(
                    f"no Ray cluster can be started on this machine ({why})", "try ray start --head"
                ) from error
            raise UsageError(
                f"no Ray cluster at '{asked.address}' ({why})",
                "start one with ray start --head, or leave out --address",
            ) from error
    try:
        yield ray
    finally:
        if not connected:
            ray.shutdown()


def _knock(address: str | None) -> None:
    """OSError at once where nobody listens at ``host:port``: Ray itself tries for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # IPv6
    if colon and not host:
        raise OSError("there is no host before the port")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


def _resources(asked: RayOptions, options: RunOptions) -> dict[str, Any]:
    gpus = asked.gpus if asked.gpus is not None else float(options.device.startswith("cuda"))
    wants: dict[str, Any] = {"num_cpus": asked.cpus, "max_retries": _RETRIES}
    if gpus:
        wants["num_gpus"] = gpus
    if asked.memory_gb is not None:
        wants["memory"] = int(asked.memory_gb * 1e9)
    return wants


@dataclass
class _Cluster:
    """Ray, and what each of our tasks asks of it.

    Attributes:
        ray: the module, connected.
        wants: arguments of ``ray.remote``.
        patience: seconds without any machine that could take a task after which the run ends.
    """

    ray: Any
    wants: Mapping[str, Any]
    patience: float
    _full_since: float | None = field(default=None, init=False)

    def as_they_end(self, references: list[Any]) -> Iterator[tuple[Any, Any]]:
        """Results as tasks end; the first error of ours cancels the rest and is raised as it was."""
        left = list(references)
        try:
            while left:
                ended, left = self.ray.wait(left, num_returns=1, timeout=_LOOK)
                for reference in ended:
                    yield reference, _value(self.ray, reference)
                if not ended:
                    self._check_room()
        finally:
            for reference in left:
                self.ray.cancel(reference, force=False)

    def gather(self, references: list[Any]) -> list[Any]:
        """Results in the order of the tasks."""
        values = dict(self.as_they_end(references))
        return [values[reference] for reference in references]

    def _check_room(self) -> None:
        """PlanError where no machine could take a task for longer than our patience: Ray itself would wait for ever."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        needs = {names[key]: float(value) for key, value in self.wants.items() if key in names}
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if any(all(has.get(name, 0.0) >= need for name, need in needs.items()) for has in machines):
            self._full_since = None
            return
        now = time.monotonic()
        self._full_since = now if self._full_since is None else self._full_since
        if now - self._full_since >= self.patience:
            asked = ", ".join(f"{name} {need:g}" for name, need in needs.items())
            raise PlanError(
                f"--executor ray: none of the cluster's {len(machines)} machines has what a task asks for ({asked})",
                "use --device cpu, or add machines" if "GPU" in needs else "ask for less, or add machines",
            )


def _value(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # What a user can mend ends the run as on one machine; so does a disk that refuses.
        if isinstance(error.cause, (RiceEvalError, OSError)):
            raise error.cause from None
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise PlanError(
            f"a task was lost {_RETRIES + 1} times ({str(error).splitlines()[0]})",
            "look at the workers' memory, then run again: finished shards stay",
        ) from error
    except ray.exceptions.RayError as error:
        raise PlanError(
            f"Ray lost a task ({next(iter(str(error).splitlines()), type(error).__name__)})",
            "look at the cluster, then run again: finished shards stay",
        ) from error
