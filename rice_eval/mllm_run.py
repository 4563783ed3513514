"""Running multimodal evaluations: train a probe and judge it, or judge a model that is there, into records."""

from __future__ import annotations

import datetime
import importlib.util
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rice_eval import __version__
from rice_eval.cards import LmmsCard, TaskCard, catalogue
from rice_eval.datasets import load_dataset
from rice_eval.datasets.base import Dataset
from rice_eval.datasets.subset import Subset
from rice_eval.environment import describe, peak_memory_mb
from rice_eval.errors import PlanError, UsageError
from rice_eval.mllm.judge import prompts_sha256, samples_text, statistics_of
from rice_eval.mllm.judge_lmms import ask_lmms
from rice_eval.mllm.lm_identity import lm_identity
from rice_eval.mllm.lmms import LmmsRun, check_online, python_for, run_lmms
from rice_eval.mllm.lmms_scores import scored
from rice_eval.mllm.lmms_task import TASK_VERSION, write_task
from rice_eval.mllm.loaded import ask_here, controls_of
from rice_eval.mllm.vqa import asked
from rice_eval.registry import did_you_mean
from rice_eval.results.bootstrap import KIND, intervals
from rice_eval.results.record import (
    Cost,
    EncoderEntry,
    Environment,
    IntervalEntry,
    JudgeEntry,
    Metric,
    ProtocolEntry,
    Record,
    TaskEntry,
    settings_hash,
)
from rice_eval.results.store import ResultStore
from rice_eval.run import Result, evaluate

__all__ = ["RECIPES", "judge_model", "train_and_judge", "write_local_task"]

RECIPES = ("perception-probe",)
"""Recipes that train here, on tokens of the bank; ``llava-next`` trains under torchrun and is then judged with ``--model``."""

PROTOCOL, PROTOCOL_VERSION = "lmms-eval", 1
"""Id of records of models that were judged on lmms-eval's benchmarks, and not trained here."""

EMBEDDED, EMBEDDED_VERSION = "short-answers", 1
"""Id of records of models that were judged on an embedded task, by whichever judge: both put the same questions."""

DTYPES = ("float32", "bfloat16", "float16")
"""Types a judged model's language model may run in."""

_RESAMPLES = 2000


def _judge_python(judge: str, python: Path | None) -> Path | None:
    """The interpreter with lmms-eval, or None for the judge of this package."""
    if judge not in ("auto", "rice-eval", "lmms-eval"):
        raise UsageError(f"--judge {judge} is not known", "choose auto, rice-eval or lmms-eval")
    if judge == "rice-eval":
        if python is not None:
            raise UsageError("--lmms-python names lmms-eval's environment", "leave --judge rice-eval out")
        return None
    if judge == "auto" and python is None and importlib.util.find_spec("lmms_eval") is None:
        return None
    return python_for(python)


def train_and_judge(
    encoders: Sequence[str],
    tasks: Sequence[str],
    *,
    recipe: str = "perception-probe",
    settings: Mapping[str, Any] | None = None,
    judge: str = "auto",
    lmms_python: Path | None = None,
    **arguments: Any,
) -> list[Result]:
    """Train a recipe's projector for each encoder and judge the models.

    Args:
        encoders: registry names.
        tasks: names of task cards of kind ``mllm`` with a training split.
        recipe: one of ``RECIPES``.
        settings: fields of the recipe's protocol (``lm``, ``side``, ``lr``, …).
        judge: ``auto``, ``rice-eval`` or ``lmms-eval``.
        lmms_python: interpreter of the environment that has lmms-eval.
        **arguments: of ``rice_eval.run.evaluate``.

    Returns:
        One result a pair of encoder and task.

    Raises:
        RiceEvalError: anything a user can mend, in one line.
    """
    if recipe == "llava-next":
        raise UsageError(
            "--recipe llava-next trains on LLaVA's data, not on the bank",
            "train it as docs/mllm.md says, then judge it with --model FOLDER",
        )
    if recipe not in RECIPES:
        raise UsageError(f"--recipe {recipe} is not known", did_you_mean(recipe, (*RECIPES, "llava-next")))
    cards = catalogue(tuple(Path(p) for p in arguments.get("include") or ()))
    for name in tasks:
        card = cards.task(name)
        if card.kind != "mllm":
            raise UsageError(f"task '{name}' is of kind {card.kind}", "choose one of kind mllm (rice-eval list tasks)")
        if card.lmms is not None:
            raise PlanError(
                f"task '{name}' has no training split for recipe '{recipe}'",
                f"train on mllm/scenes-vqa, then judge what it left: rice-eval mllm --model DIR --task {name}",
            )
    lm_identity(str((settings or {}).get("lm", "smollm2-135m")))  # refused before any work where it can't be had
    python = _judge_python(judge, lmms_python)
    return evaluate(encoders, tasks, protocols=[recipe], settings=settings, lmms_python=python, **arguments)


def _embedded(card: TaskCard, split: str, limit: int | None) -> Dataset:
    dataset = load_dataset(card.dataset, split, None, card.options)
    return dataset if limit is None else Subset(dataset, limit)


def write_local_task(name: str, out: Path, *, train: bool = False, limit: int | None = None) -> tuple[Path, str]:
    """Write an embedded task for lmms-eval.

    Args:
        name: of a task card whose data are embedded.
        out: folder.
        train: the training split too, in LLaVA's format.
        limit: only this many images a split.

    Returns:
        The folder, and the task's id for ``--tasks``.
    """
    card = catalogue().task(name)
    if card.kind != "mllm" or card.lmms is not None:
        raise UsageError(f"task '{name}' is not embedded", "lmms-eval brings it itself; write mllm/scenes-vqa")
    written = card.dataset.replace("-", "_")
    lessons = _embedded(card, card.train, limit) if train else None
    return write_task(_embedded(card, card.test, limit), out, written, lessons), written


def judge_model(
    model: str,
    tasks: Sequence[str],
    *,
    judge: str = "auto",
    lmms_python: Path | None = None,
    results: Path | str = "results",
    device: str = "cpu",
    dtype: str = "float32",
    limit: int | None = None,
    processes: int = 1,
    include: tuple[Path, ...] = (),
) -> list[Result]:
    """Judge a model that is there: with its images, blind, and, where it is a trained probe, with the mean image.

    Args:
        model: a trained probe's ``.files`` folder, a folder of ``rice-eval mllm llava``, or a LLaVA checkpoint.
        tasks: names of task cards of kind ``mllm``.
        judge: ``auto`` (lmms-eval where it is installed), ``rice-eval`` (embedded tasks alone), or ``lmms-eval``.
        lmms_python: interpreter of the environment that has lmms-eval; this one by default.
        results: folder that records go to.
        device: torch device.
        dtype: of the language model: one of ``DTYPES``; part of what makes records comparable.
        limit: only the first so many documents (or, of an embedded task, images).
        processes: data-parallel processes of lmms-eval.
        include: folders with more cards.

    Raises:
        PlanError: a task that lmms-eval does not have, or that needs a network which is switched off.
        MissingExtraError: lmms-eval is asked for, or needed by a task, and is not installed.
        CheckpointError: the model can't be loaded.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not known", f"choose {', '.join(DTYPES)}")
    cards = catalogue(include)
    chosen = [cards.task(name) for name in tasks]
    for card in chosen:
        if card.kind != "mllm":
            raise UsageError(f"task '{card.name}' is of kind {card.kind}", "choose one of kind mllm")
        if card.lmms is not None:
            if card.lmms.task is None:
                raise PlanError(f"lmms-eval has no task for '{card.name}'", card.note or "choose another task")
            if judge == "rice-eval":
                raise PlanError(f"task '{card.name}' is a benchmark of lmms-eval", "leave --judge rice-eval out")
            check_online(card.name, card.lmms.network)
    if not Path(model).expanduser().exists() and model.count("/") != 1:
        raise UsageError(
            f"--model {model}: no such folder", "give a trained probe's .files folder or a LLaVA checkpoint"
        )
    python = _judge_python(judge, lmms_python)
    if python is None and any(card.lmms is not None for card in chosen):
        python = python_for(None)
    if python is None and processes > 1:
        raise UsageError(f"--processes {processes} are lmms-eval's", "install it, or name its python by --lmms-python")
    store = ResultStore(results)
    store.check_writable()
    out = []
    asked_with = {"model": model, "device": device, "dtype": dtype}
    for card in chosen:
        if card.lmms is None:
            path = _judge_embedded(asked_with, card, python, store, limit, processes)
        else:
            assert python is not None
            path = _judge_benchmark(asked_with, card, card.lmms, python, store, limit, processes)
        out.append(Result(store.load(path), path))
    return out


def _judge_embedded(
    model: Mapping[str, str],
    card: TaskCard,
    python: Path | None,
    store: ResultStore,
    limit: int | None,
    processes: int,
) -> Path:
    """Both judges put the same questions and leave the same record but for ``judge``."""
    start = time.perf_counter()
    test = _embedded(card, card.test, limit)
    questions = asked(test)
    if python is None:
        samples, facts = ask_here(model["model"], test, questions, model["device"], getattr(torch, model["dtype"]))
        told = {"name": "rice-eval", "version": __version__, "task": test.name, "task_version": str(TASK_VERSION)}
        told |= {"task_hash": test.fingerprint[:16]}
    else:
        with tempfile.TemporaryDirectory(prefix="rice-eval-judge-") as name:
            args = {**model, "facts": str(Path(name) / "facts.json")}
            samples, told = ask_lmms(python, test, questions, args, controls_of(model["model"]), processes)
            facts = json.loads((Path(name) / "facts.json").read_text(encoding="utf-8"))
    statistics = statistics_of(samples, [test.image_id(i) for i in range(len(test))])
    bounds = intervals(statistics, resamples=_RESAMPLES)
    metrics = {name: _metric(value, bounds.get(name), True) for name, value in statistics.point().items()}
    entry = JudgeEntry(**told, prompts_sha256=prompts_sha256(samples[""]), questions=len(questions))
    protocol = _protocol(EMBEDDED, EMBEDDED_VERSION, facts, {"task_version": str(TASK_VERSION), "limit": limit})
    record = _record(card, facts, protocol, metrics, entry, test.fingerprint, len(test), model["device"])
    record = record.model_copy(update={"seconds": {"total": round(time.perf_counter() - start, 3)}})
    return store.save(record, statistics, {"samples.jsonl": samples_text(samples).encode()})


def _judge_benchmark(
    model: Mapping[str, str],
    card: TaskCard,
    lmms: LmmsCard,
    python: Path,
    store: ResultStore,
    limit: int | None,
    processes: int,
) -> Path:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rice-eval-judge-") as name:
        runs: dict[str, LmmsRun] = {}
        for control in controls_of(model["model"]):
            args = {**model, "facts": str(Path(name) / "facts.json")}
            args |= {"control": control} if control else {}
            runs[control] = run_lmms(python, args, str(lmms.task), limit=limit, processes=processes)
        facts: dict[str, Any] = json.loads((Path(name) / "facts.json").read_text(encoding="utf-8"))
    seen = runs[""]
    values, statistics = scored(card, runs)
    bounds = intervals(statistics, resamples=_RESAMPLES) if statistics is not None else {}
    metrics = {name: _metric(value, bounds.get(name), percent) for name, (value, percent) in values.items()}
    settings = {
        "lmms_eval": seen.version,
        "task": seen.task,
        "task_version": seen.task_version,
        "task_hash": seen.task_hash,
        "limit": limit,
    }
    protocol = _protocol(PROTOCOL, PROTOCOL_VERSION, facts, settings)
    entry = JudgeEntry(
        name="lmms-eval",
        version=seen.version,
        task=seen.task,
        task_version=seen.task_version,
        task_hash=seen.task_hash,
        prompts_sha256=seen.prompts_sha256,
        questions=len(seen.samples),
    )
    documents = seen.documents_hash or seen.prompts_sha256
    record = _record(card, facts, protocol, metrics, entry, documents, len(seen.samples), model["device"])
    if statistics is None:
        record = record.model_copy(
            update={"interval": None, "warnings": ("no interval: the metric is no mean over documents",)}
        )
    record = record.model_copy(update={"seconds": {"total": round(time.perf_counter() - start, 3)}})
    logs = {f"samples{'-' + c if c else ''}.jsonl": run.log for c, run in runs.items()}
    return store.save(record, statistics, logs)


def _protocol(name: str, version: int, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> ProtocolEntry:
    """What separates records: of the model its language model, tuned parts and tiles, not the encoder; and the task's settings."""
    told = {"lm": facts["lm"], "dtype": facts["mllm"]["lm"]["dtype"], "tuned": facts["tuned"]}
    told |= {"tiles": facts["mllm"]["tiles"], **settings}
    return ProtocolEntry(id=name, hash=settings_hash(name, version, told), settings=told, version=version)


def _metric(value: float, bounds: tuple[float, float] | None, percent: bool) -> Metric:
    low, high = bounds if bounds is not None and bounds[0] == bounds[0] else (None, None)
    return Metric(value=value, low=low, high=high, unit="%" if percent else "")


def _record(
    card: TaskCard,
    facts: Mapping[str, Any],
    protocol: ProtocolEntry,
    metrics: Mapping[str, Metric],
    judge: JudgeEntry,
    documents: str,
    count: int,
    device: str,
) -> Record:
    """A judged model's record; ``documents`` tells what was asked, ``count`` over how many images or documents."""
    tiles = facts["mllm"]["tiles"]
    return Record(
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        encoder=EncoderEntry(**facts["encoder"], weights=None),
        task=TaskEntry(
            name=card.name,
            kind=card.kind,
            dataset=card.dataset,
            options=dict(card.options),
            train_split="",
            test_split=card.test,
            train_fingerprint="",
            test_fingerprint=documents,
            n_train=0,
            n_test=count,
            classes=(),
            license=card.license,
        ),
        protocol=protocol,
        metric=card.metric,
        metrics=dict(metrics),
        interval=IntervalEntry(kind=KIND, level=0.95, resamples=_RESAMPLES),
        per_class={},
        view=str(tiles.get("view", tiles["kind"])),
        layers=tuple(facts["mllm"]["layers"]),
        norm=bool(facts["mllm"]["norm"]),
        seeds=(0,),
        chosen={"model": facts["mllm"], "fingerprint": facts["fingerprint"]},
        heads=(),
        cost=Cost(
            params=facts["encoder"]["params"], flops=None, tokens_per_image=0.0, images_per_second=None, forwards=0
        ),
        bank=None,
        seconds={},
        peak_memory_mb=peak_memory_mb(),
        environment=Environment.model_validate(describe(device, 1)),
        statistics=None,
        judge=judge,
    )
