"""Run a plan: load each encoder once, share every pass among the jobs that can, write one record a job."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import Encoder, EncoderFacts, facts_as_dict
from rice_eval.bank.costs import counted_once
from rice_eval.bank.extract import Source, SourceView, open_source
from rice_eval.bank.store import Bank, default_bank_root
from rice_eval.cards import TaskCard, catalogue
from rice_eval.environment import describe, launched, peak_memory_mb
from rice_eval.errors import DataError, PlanError, UsageError
from rice_eval.pictures import save_pictures, save_predictions, token_maps
from rice_eval.plan import EncoderRef, Job, Plan, TaskRef, make_plan, parse_encoder, task_for_dataset
from rice_eval.progress import Reporter, progress
from rice_eval.protocols.base import Context, Outcome
from rice_eval.report.panel_files import panels_folder, save_analysis
from rice_eval.results.bootstrap import KIND as INTERVAL_KIND
from rice_eval.results.bootstrap import intervals
from rice_eval.results.entries import class_entries, metric_entries
from rice_eval.results.record import (
    BankFacts,
    Cost,
    EncoderEntry,
    Environment,
    HeadScore,
    IntervalEntry,
    JudgeEntry,
    ProtocolEntry,
    Record,
    TaskEntry,
)
from rice_eval.results.store import ResultStore
from rice_eval.views import View

if TYPE_CHECKING:
    from rice_eval.datasets.base import Dataset

__all__ = [
    "Elsewhere",
    "Loaded",
    "Result",
    "RunOptions",
    "SourceKey",
    "check_loaded",
    "evaluate",
    "execute",
    "load",
    "open_sources",
]

SourceKey = tuple[str, str, bool, str]
"""What tells two sources of one encoder apart: dataset fingerprint, resolved view, norm, storage type."""


@dataclass(frozen=True)
class RunOptions:
    """How to run, none of which changes what a number means.

    Attributes:
        results: folder that records go to.
        bank: folder of the bank; None for the user's cache folder.
        device: torch device of encoder and heads.
        batch_size: images a forward.
        workers: decoding workers; None lets the pass choose.
        autocast: dtype of the forward under autocast (``bf16``, ``fp16``), or None for the weights' own.
        compile: run the encoder's blocks through ``torch.compile``; said in the record, and part of the bank's key.
        store: whether tokens are kept in the bank.
        on_bad_image: ``stop`` or ``skip``.
        panels: test images drawn for the report.
        predictions: folder for every test image's raw prediction, or None.
        resamples: bootstrap resamples of the intervals.
        trust_remote_code: let code shipped with a checkpoint run.
        lmms_python: interpreter that has lmms-eval, which then judges multimodal models; None: the judge of this package.
    """

    results: Path
    bank: Path | None = None
    device: str = "cpu"
    batch_size: int = 16
    workers: int | None = None
    autocast: str | None = None
    compile: bool = False
    store: bool = True
    on_bad_image: str = "stop"
    panels: int = 8
    predictions: Path | None = None
    resamples: int = 2000
    trust_remote_code: bool = False
    lmms_python: Path | None = None


@dataclass(frozen=True)
class Result:
    """A record and where it was written."""

    record: Record
    path: Path


@dataclass(frozen=True)
class Elsewhere:
    """A pass, or parts of it, that other processes made for this run: images, seconds, sentences for the record."""

    forwards: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass
class Loaded:
    """An encoder in memory and the sources opened on it.

    Attributes:
        encoder: on its device.
        seconds: that loading took.
        sources: what its jobs read.
        elsewhere: passes that other processes of the same run made for it; the first job that reads a source takes
            them into its record.
        bank: its folder, where operations are kept once counted; None where nothing is kept.
        counted: ``(H, W)`` of an image -> operations of its forward.
    """

    encoder: Encoder
    seconds: float
    sources: dict[SourceKey, Source]
    elsewhere: dict[SourceKey, Elsewhere] = field(default_factory=dict)
    bank: Path | None = None
    counted: dict[tuple[int, int], int | None] = field(default_factory=dict)

    def flops(self, height: int, width: int) -> int | None:
        """Operations of one image's forward, counted once a size."""
        size = (height, width)
        if size not in self.counted:
            if self.bank is None:
                self.counted[size] = self.encoder.flops(*size)
            else:
                name = self.encoder.fingerprint
                self.counted[size] = counted_once(self.bank, name, size, lambda: self.encoder.flops(*size))
        return self.counted[size]


Executor = Callable[[Plan, RunOptions, Reporter], "list[Result]"]
"""Runs a plan: ``execute``, or one that spreads it over machines."""


def evaluate(
    encoders: Sequence[str],
    tasks: Sequence[str] = (),
    *,
    dataset: str | None = None,
    kind: str = "segmentation",
    data: str | Path | Mapping[str, str | Path] | None = None,
    options: Mapping[str, Any] | None = None,
    protocols: Sequence[str] = (),
    view: str | None = None,
    settings: Mapping[str, Any] | None = None,
    weights: Mapping[str, str | Path] | None = None,
    results: str | Path = "results",
    include: Sequence[str | Path] = (),
    limit_train: int | None = None,
    limit_test: int | None = None,
    show_progress: bool | None = None,
    executor: Executor | None = None,
    **run_options: Any,
) -> list[Result]:
    """Evaluate encoders on tasks and write a record each.

    Args:
        encoders: registry names (``NAME`` or ``NAME@WEIGHTS``).
        tasks: task names (``segmentation/scenes``); or give ``dataset`` and ``kind``.
        dataset: a dataset's name, with ``options`` for its reader.
        kind: kind of task that ``dataset`` is used for.
        data: folder (or zip) of the data; a mapping from dataset name to folder where tasks need several.
        options: options of the dataset's reader.
        protocols: protocol ids; the task's own where empty.
        view: replaces the task's view.
        settings: fields of the protocols.
        weights: encoder name -> checkpoint that replaces the card's source.
        results: folder that records go to.
        include: folders with more cards.
        limit_train, limit_test: keep only this many images, spread evenly; the fingerprint changes with it.
        show_progress: bars; by default only on a terminal.
        executor: what runs the plan: ``execute``, in this process, by default; or
            ``functools.partial(rice_eval.cluster.execute_on_ray, ray_options=RayOptions(…))``.
        **run_options: fields of ``RunOptions``.

    Returns:
        one result a job, in the order of the plan. Under ``torchrun`` the first process has them all and writes the records; the
        others help with protocols that share their work, and get none.

    Raises:
        RiceEvalError: anything a user can mend, in one line.
    """
    plan = plan_of(
        encoders,
        tasks,
        dataset=dataset,
        kind=kind,
        data=data,
        options=options,
        protocols=protocols,
        view=view,
        settings=settings,
        weights=weights,
        include=include,
        limit_train=limit_train,
        limit_test=limit_test,
    )
    try:
        how = RunOptions(results=Path(results), **run_options)
    except TypeError as error:
        raise UsageError(f"evaluate: {error}", "see rice_eval.run.RunOptions for what a run takes") from error
    with progress(show_progress if launched()[0] == 0 else False) as report:
        return (executor or execute)(plan, how, report)


def plan_of(
    encoders: Sequence[str],
    tasks: Sequence[str] = (),
    *,
    dataset: str | None = None,
    kind: str = "segmentation",
    data: str | Path | Mapping[str, str | Path] | None = None,
    options: Mapping[str, Any] | None = None,
    protocols: Sequence[str] = (),
    view: str | None = None,
    settings: Mapping[str, Any] | None = None,
    weights: Mapping[str, str | Path] | None = None,
    include: Sequence[str | Path] = (),
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Plan:
    """The plan that ``evaluate`` would run; its arguments are ``evaluate``'s."""
    folders = tuple(Path(p) for p in include)
    cards = catalogue(folders)
    if bool(tasks) == (dataset is not None):
        raise UsageError("give either tasks or one dataset", "e.g. tasks=['segmentation/scenes'] or dataset='scenes'")
    chosen = (
        [cards.task(name) for name in tasks]
        if dataset is None
        else [task_for_dataset(cards, kind, dataset, options or {})]
    )
    refs = [TaskRef(card, _data_of(card, data), limit_train, limit_test) for card in chosen]
    checkpoints = {name: Path(path) for name, path in (weights or {}).items()}
    unknown = set(checkpoints) - set(encoders)
    if unknown:
        raise UsageError(
            f"weights are given for '{sorted(unknown)[0]}', which is not among the encoders", "check the name"
        )
    return make_plan(
        [parse_encoder(name, checkpoints.get(name)) for name in encoders],
        refs,
        protocol_ids=protocols,
        view=view,
        settings=settings,
        include=folders,
    )


def _data_of(card: TaskCard, data: str | Path | Mapping[str, str | Path] | None) -> Path | None:
    if isinstance(data, Mapping):
        found = data.get(card.name, data.get(card.dataset))
        return Path(found) if found is not None else None
    return Path(data) if data is not None else None


def execute(
    plan: Plan,
    options: RunOptions,
    report: Reporter,
    done: Callable[[Result], None] | None = None,
    elsewhere: Mapping[SourceKey, Elsewhere] | None = None,
) -> list[Result]:
    """Run every job of a plan.

    A job whose error a user can mend ends the run; records written before it stay.

    Args:
        plan: from ``make_plan``.
        options: how to run.
        report: progress bars.
        done: called with each result as it is written.
        elsewhere: passes that other processes of this run made, for a plan of one encoder.
    """
    rank, processes = launched()
    store = ResultStore(options.results)
    if rank == 0:
        store.check_writable()
    if processes > 1 and options.device == "cuda":
        options = replace(options, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    bank = Bank(options.bank or default_bank_root()) if options.store else None
    out = []
    for ref, group in groupby(plan.jobs, key=lambda job: job.encoder):
        jobs = [job for job in group if rank == 0 or job.protocol.distributed]
        if not jobs:
            continue
        loaded = load(ref, plan, options)
        loaded.elsewhere.update(elsewhere or {})
        loaded.bank = None if bank is None else bank.root
        for job in jobs:
            check_loaded(job, loaded.encoder, plan)
            if bank is None and job.protocol.needs_bank(loaded.encoder.facts):
                raise PlanError(
                    f"--no-store: protocol '{job.protocol.id}' reads the tokens of {ref.name} several times",
                    "leave out --no-store"
                    + ("" if job.protocol.rereads else ", or let --set leave one head to choose from"),
                )
        open_sources(loaded, jobs, plan, bank, options, report)
        for job in jobs:
            result = _run_job(job, plan, loaded, store, options, report)
            if result is None:
                continue
            out.append(result)
            if done is not None:
                done(result)
    return out


def load(ref: EncoderRef, plan: Plan, options: RunOptions) -> Loaded:
    """The encoder on its device; no source is opened yet."""
    start = time.perf_counter()
    encoder = load_encoder(
        ref.name,
        weights=ref.weights,
        device=options.device,
        include=plan.include,
        trust_remote_code=options.trust_remote_code,
    )
    if options.compile:
        encoder.compile()
    return Loaded(encoder, time.perf_counter() - start, {})


def check_loaded(job: Job, encoder: Encoder, plan: Plan) -> None:
    """What only a loaded encoder can tell: abilities, and the sides of every frame of every image size."""
    lacking = job.protocol.abilities - set(encoder.facts.abilities)
    if lacking:
        raise PlanError(
            f"protocol '{job.protocol.id}' needs {', '.join(sorted(lacking))} of encoder '{encoder.name}', which has not",
            "choose another encoder or protocol",
        )
    job.protocol.layers(encoder.facts)


def open_sources(
    loaded: Loaded, jobs: Sequence[Job], plan: Plan, bank: Bank | None, options: RunOptions, report: Reporter
) -> None:
    """One source for each (dataset, view, norm, dtype), at the union of the layers that the jobs read."""
    wanted: dict[SourceKey, tuple[Dataset, set[int]]] = {}
    for job in jobs:
        layers = loaded.encoder.resolve_layers(job.protocol.layers(loaded.encoder.facts))
        for split, views in job.protocol.views().items():
            dataset = plan.part(job, split)
            for view in views:
                key = _source_key(dataset, view, loaded.encoder, job)
                wanted.setdefault(key, (dataset, set()))[1].update(layers)
    for key, (dataset, union) in wanted.items():
        _, view, norm, dtype = key
        loaded.sources[key] = open_source(
            lambda: loaded.encoder,
            loaded.encoder.facts,
            dataset,
            view,
            tuple(sorted(union)),
            norm,
            dtype,
            bank,
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
            autocast=options.autocast,
            compiled=options.compile,
            on_bad_image=options.on_bad_image,
            store=options.store,
            progress=report,
        )


def _source_key(dataset: Dataset, view: str, encoder: Encoder, job: Job) -> SourceKey:
    resolved = View.parse(view).resolve(encoder.multiple)
    return dataset.fingerprint, str(resolved), job.protocol.norm, job.protocol.tokens


def _run_job(
    job: Job, plan: Plan, loaded: Loaded, store: ResultStore, options: RunOptions, report: Reporter
) -> Result | None:
    """One record; None in every process of ``torchrun`` but the first."""
    rank, processes = launched()
    train, test = plan.dataset(job.task, "train"), plan.dataset(job.task, "test")
    used: list[Source] = []
    made: list[Elsewhere] = []
    layers = loaded.encoder.resolve_layers(job.protocol.layers(loaded.encoder.facts))

    def tokens(split: str, view: str) -> SourceView:
        key = _source_key(plan.part(job, split), view, loaded.encoder, job)
        source = loaded.sources[key]
        if source not in used:
            used.append(source)
            made.append(loaded.elsewhere.pop(key, Elsewhere()))
        return source.select(layers)

    before = {id(s): (s.forwards, s.seconds) for s in loaded.sources.values()}
    start = time.perf_counter()
    context = Context(
        facts=loaded.encoder.facts,
        encoder=lambda: loaded.encoder,
        train=train,
        test=test,
        tokens=tokens,
        device=torch.device(options.device),
        progress=report,
        panels=options.panels,
        keep_predictions=options.predictions is not None,
        scratch=(options.bank or default_bank_root()) / "online" if options.store else None,
        lmms_python=options.lmms_python,
        weights=job.encoder.weights,
    )
    outcome = job.protocol.run(context)
    if rank > 0:
        return None
    ran = time.perf_counter() - start
    passes = sum(s.seconds - before[id(s)][1] for s in used) + sum(m.seconds for m in made)
    forwards = sum(s.forwards - before[id(s)][0] for s in used) + sum(m.forwards for m in made)
    start = time.perf_counter()
    bounds = intervals(outcome.statistics, resamples=options.resamples)
    seconds = {
        "load": loaded.seconds,
        "pass": passes,
        **outcome.seconds,
        "bootstrap": time.perf_counter() - start,
        "total": loaded.seconds + ran + time.perf_counter() - start,
    }
    left_out = {name for split in job.protocol.views() for name in plan.part(job, split).left_out}
    together = [f"{processes} processes shared the work"] if processes > 1 and job.protocol.distributed else []
    record = _record(job, loaded.encoder.facts, (train, test), outcome, bounds, used, left_out, options)
    record = record.model_copy(
        update={
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "cost": _cost(loaded, used, forwards, passes, outcome.forwards),
            "warnings": tuple(dict.fromkeys([*(n for m in made for n in m.notes), *together, *record.warnings])),
        }
    )
    path = store.save(record, outcome.statistics, outcome.files)
    if options.predictions is not None and outcome.predictions is not None:
        parts = [job.encoder.name.replace("/", "-"), job.task.card.name.replace("/", "-"), job.protocol.id]
        save_predictions(options.predictions.joinpath(*parts), outcome.predictions, test)
    maps = {}
    if outcome.panels and options.store and job.protocol.view in job.protocol.views().get("test", ()):
        reader = tokens("test", job.protocol.view).reader()
        maps = token_maps(reader, outcome.layers[-1], [panel.index for panel in outcome.panels])
    save_pictures(path, outcome.panels, test, maps, job.task.card.kind)
    if outcome.analysis is not None:
        save_analysis(panels_folder(path), outcome.analysis)
    return Result(store.load(path), path)


def _cost(loaded: Loaded, sources: Sequence[Source], forwards: int, seconds: float, own: int) -> Cost:
    facts = loaded.encoder.facts
    size = sources[-1].frame_size if sources else (facts.resolution, facts.resolution)
    tokens = sources[-1].tokens_per_image if sources else 0.0
    return Cost(
        params=facts.params,
        flops=loaded.flops(*size),
        tokens_per_image=tokens,
        images_per_second=round(forwards / seconds, 3) if forwards and seconds > 0 else None,
        forwards=forwards + own,
    )


def _record(
    job: Job,
    facts: EncoderFacts,
    splits: tuple[Dataset, Dataset],
    outcome: Outcome,
    bounds: Mapping[str, tuple[float, float]],
    sources: Sequence[Source],
    left_out: set[str],
    options: RunOptions,
) -> Record:
    train, test = splits
    card = job.task.card
    stored = [s for s in sources if s.key is not None]
    notes = [note for s in sources for note in s.notes]
    now = datetime.datetime.now(datetime.timezone.utc)
    metrics = metric_entries(outcome.statistics, bounds)
    if job.protocol.metric not in metrics:
        raise DataError(
            f"task '{card.name}': '{job.protocol.metric}' has nothing to divide by on {len(test)} test images",
            "check that the test split is labelled",
        )
    return Record(
        created=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        encoder=EncoderEntry(
            **facts_as_dict(facts), weights=job.encoder.weights.name if job.encoder.weights is not None else None
        ),
        task=TaskEntry(
            name=card.name,
            kind=card.kind,
            dataset=card.dataset,
            options=dict(card.options),
            train_split=train.split,
            test_split=test.split,
            train_fingerprint=train.fingerprint,
            test_fingerprint=test.fingerprint,
            n_train=len(train),
            n_test=len(test),
            classes=tuple(test.classes if "semantic" in job.protocol.needs else test.things or test.classes),
            license=card.license,
        ),
        protocol=ProtocolEntry(
            id=job.protocol.id,
            hash=job.protocol.hash,
            settings=job.protocol.settings(),
            version=job.protocol.version,
        ),
        metric=job.protocol.metric,
        metrics=metrics,
        interval=IntervalEntry(kind=INTERVAL_KIND, level=0.95, resamples=options.resamples),
        per_class=class_entries(outcome.statistics),
        view=str(View.parse(job.protocol.view).resolve(facts.patch)),
        layers=outcome.layers,
        norm=job.protocol.norm,
        seeds=(job.protocol.seed,),
        chosen=outcome.chosen,
        heads=tuple(HeadScore(settings=h.settings, score=h.score) for h in outcome.heads),
        cost=Cost(params=facts.params, flops=None, tokens_per_image=0.0, images_per_second=None, forwards=0),
        bank=BankFacts(
            dtype=job.protocol.tokens, bytes=sum(s.bytes for s in stored), keys=tuple(str(s.key) for s in stored)
        )
        if stored
        else None,
        seconds={},
        peak_memory_mb=peak_memory_mb(),
        environment=Environment.model_validate(describe(options.device, torch.get_num_threads())),
        statistics=None,
        judge=JudgeEntry(**outcome.judge) if outcome.judge is not None else None,
        losses=outcome.losses,
        skipped=tuple(sorted(left_out.union(*(s.skipped for s in sources)))),
        warnings=tuple(dict.fromkeys([*notes, *outcome.warnings])),
    )
