"""Checkpoints of a training run as they appear: each is evaluated once, judged by the gate, and added to a curve.

``<results>/watch.jsonl`` holds one line a checkpoint and is what a restart goes on from; ``<results>/curve.csv`` is made from it
and from the records.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rice_eval.errors import RecordError, RiceEvalError, UsageError
from rice_eval.results.compare import sides
from rice_eval.results.gate import run_gate
from rice_eval.results.policy import Policy
from rice_eval.results.store import StoredRecord, load_record, read_records, write_atomic
from rice_eval.results.tables import number

__all__ = ["CURVE", "STATE", "Step", "Watch", "curve", "watch", "worst"]

STATE, CURVE = "watch.jsonl", "curve.csv"

Evaluate = Callable[[Path], Sequence[StoredRecord]]
"""Evaluates one checkpoint and gives its records, already written to the store."""


@dataclass
class Step:
    """One checkpoint of the run.

    Attributes:
        checkpoint: its path.
        size, modified: bytes and newest change (ns); a checkpoint that changes is evaluated again.
        records: files of its records, relative to the results folder where they lie in it.
        error: why it could not be evaluated or judged; empty where it was.
        verdicts: plain verdicts of the gate; empty for the one it starts from.
        exit_code: the gate's; 2 for a checkpoint that could not be evaluated or judged.
        run: what it was evaluated as, ``Watch.run``.
    """

    checkpoint: str
    size: int
    modified: int
    records: list[str] = field(default_factory=list)
    error: str = ""
    verdicts: list[dict[str, object]] = field(default_factory=list)
    exit_code: int = 0
    run: str = ""


@dataclass(frozen=True)
class Watch:
    """What to watch and how.

    Attributes:
        pattern: glob of checkpoints; ``**`` goes down folders.
        results: folder that records, state and curve go to.
        policy: the gate's.
        run: what each checkpoint is evaluated as (encoder, tasks, protocols), in words; steps of another run in the same folder are
            kept and have no part in this one.
        encoder: whose checkpoints they are: which one of ``against`` they are held against where that folder holds several.
        against: ``first``, ``previous`` or ``best`` checkpoint so far, or a results folder.
        interval: seconds between looks.
        idle: stop after this many seconds with nothing new; None: never.
        once: evaluate what is there now and stop.
    """

    pattern: str
    results: Path
    policy: Policy
    against: str = "first"
    interval: float = 60.0
    idle: float | None = None
    once: bool = False
    run: str = ""
    encoder: str = ""


def watch(
    settings: Watch,
    evaluate: Evaluate,
    said: Callable[[Step], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Step]:
    """Evaluate checkpoints as they appear, in the natural order of their names.

    A checkpoint is taken up when its size and time have not changed between two looks, so that one that is still being written
    is not read. One that fails is noted and the watch goes on; it is tried again when its file changes and when the watch is
    started again. Each is judged against those before it in the order of names, whenever it came: where one comes late or
    changes, those behind it are judged again.

    Args:
        settings: what and how.
        evaluate: does the work for one checkpoint.
        said: called with each step as it is done, and with those whose verdict changed by it.
        clock, sleep: for tests.

    Returns:
        every step of ``settings.run``, those done before included.

    Raises:
        UsageError: ``against`` is neither a known word nor a folder with records of one encoder (or of ``settings.encoder``).
        RecordError: a damaged state file.
    """
    fixed = _fixed_baseline(settings)
    state = _load_state(settings.results / STATE)
    others = [s for s in state if s.run != settings.run]
    steps = [s for s in state if s.run == settings.run]
    again = {s.checkpoint for s in steps if s.error}
    seen: dict[str, tuple[int, int]] = {}
    quiet_since = clock()
    while True:
        done = {(s.checkpoint, s.size, s.modified) for s in steps if s.checkpoint not in again}
        for path in sorted(glob.glob(settings.pattern, recursive=True), key=_natural):
            stamp = _stamp(Path(path))
            if stamp is None or (path, *stamp) in done:
                continue
            settled = settings.once or seen.get(path) == stamp
            seen[path] = stamp
            if not settled:
                quiet_since = clock()
                continue
            again.discard(path)
            step = Step(path, *stamp, run=settings.run)
            _take(step, settings, evaluate)
            steps = sorted([*(s for s in steps if s.checkpoint != path), step], key=lambda s: _natural(s.checkpoint))
            place = steps.index(step)
            behind = steps[place:] if fixed is None else [step]
            changed = [s for k, s in enumerate(behind, place) if _judge(s, steps[:k], settings, fixed)]
            _save(settings.results, [*others, *steps])
            quiet_since = clock()
            if said is not None:
                for one in [step, *(later for later in changed if later is not step)]:
                    said(one)
        if settings.once or (settings.idle is not None and clock() - quiet_since >= settings.idle):
            return steps
        sleep(settings.interval)


def _take(step: Step, settings: Watch, evaluate: Evaluate) -> None:
    try:
        stored = list(evaluate(Path(step.checkpoint)))
    except RiceEvalError as error:
        step.error, step.exit_code = str(error), 2
        return
    step.records = [_relative(entry.path, settings.results) for entry in stored]


def _judge(step: Step, earlier: Sequence[Step], settings: Watch, fixed: list[StoredRecord] | None) -> bool:
    """Hold a step against its baseline; whether that changed what is said of it. One that was not evaluated stays as it is."""
    if not step.records:
        return False
    before = (step.error, step.exit_code, step.verdicts)
    step.error, step.exit_code, step.verdicts = "", 0, []
    try:
        baseline = fixed if fixed is not None else _baseline(settings, earlier)
        if baseline:
            report = run_gate(baseline, [_stored(settings.results, name) for name in step.records], settings.policy)
            step.verdicts, step.exit_code = [v.plain() for v in report.verdicts], report.exit_code
    except RiceEvalError as error:
        step.error, step.exit_code = str(error), 2
    return before != (step.error, step.exit_code, step.verdicts)


def _fixed_baseline(settings: Watch) -> list[StoredRecord] | None:
    """The records of the folder to hold against; None for first, previous and best."""
    against = settings.against
    if against in ("first", "previous", "best"):
        return None
    if not Path(against).exists():
        raise UsageError(
            f"--against {against} is no folder of records", "give first, previous, best or a results folder"
        )
    found = sides(read_records([against]))
    if len(found) > 1:
        found = [s for s in found if s.records[0].record.encoder.name == settings.encoder] or found
    if len(found) != 1:
        names = ", ".join(s.label for s in found[:6])
        raise UsageError(
            f"--against {against} holds several encoders: {names}"
            if found
            else f"--against {against} holds no records",
            "point at a folder with records of one encoder, or at one record file",
        )
    return list(found[0].records)


def _baseline(settings: Watch, earlier: Sequence[Step]) -> list[StoredRecord]:
    good = [s for s in earlier if s.records and not s.error]
    if not good:
        return []
    loaded = [[_stored(settings.results, name) for name in s.records] for s in good]
    if settings.against == "first":
        return loaded[0]
    if settings.against == "previous":
        return loaded[-1]
    return max(loaded, key=_goodness)


def _goodness(stored: Sequence[StoredRecord]) -> float:
    headlines = [e.record.headline for e in stored]
    return sum(h.value if h.higher_is_better else -h.value for h in headlines) / max(1, len(headlines))


def _stored(results: Path, name: str) -> StoredRecord:
    path = results / name
    return StoredRecord(path, load_record(path))


def _relative(path: Path, results: Path) -> str:
    try:
        return str(path.resolve().relative_to(results.resolve()))
    except ValueError:
        return str(path.resolve())


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``step-9`` before ``step-10``."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Bytes and newest change of a file or a folder's files; None where it went away meanwhile."""
    try:
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        stats = [p.stat() for p in files]
    except OSError:
        return None
    if not stats:
        return None
    return sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)


def _load_state(path: Path) -> list[Step]:
    if not path.exists():
        return []
    steps = []
    for number_, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            steps.append(Step(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise RecordError(
                f"{path}, line {number_}: is no step of a watch ({error})", "delete the file to start over"
            ) from error
    return steps


def _save(results: Path, steps: Sequence[Step]) -> None:
    results.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in steps]
    write_atomic(results / STATE, "".join(lines).encode())
    write_atomic(results / CURVE, curve(results, steps).encode())


def curve(results: Path, steps: Sequence[Step]) -> str:
    """CSV: one row a checkpoint and record, in the order of checkpoints, with the gate's verdict."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["checkpoint", "encoder", "task", "protocol", "metric", "value", "low", "high", "status", "reason"])
    for step in steps:
        if step.error and not step.records:
            writer.writerow([step.checkpoint, "", "", "", "", "", "", "", "failed", step.error])
        verdicts = {(v["task"], v["protocol"], v["metric"]): v for v in step.verdicts}
        for name in step.records:
            try:
                record = _stored(results, name).record
            except RecordError as error:  # removed or damaged since: no reason to stop
                writer.writerow([step.checkpoint, "", "", "", "", "", "", "", "failed", str(error)])
                continue
            verdict = verdicts.get((record.task.name, record.protocol.id, record.metric), {})
            head = record.headline
            status, reason = verdict.get("status", "start"), verdict.get("reason", "")
            if step.error:
                status, reason = "failed", step.error
            writer.writerow(
                [
                    step.checkpoint, record.encoder.name, record.task.name, record.protocol.id, record.metric,
                    number(head.value), number(head.low), number(head.high), status, reason,
                ]
            )  # fmt: skip
    return buffer.getvalue()


def worst(steps: Sequence[Step]) -> int:
    """1 where a checkpoint is a regression, else 2 where one was unusable or failed, else 0."""
    codes = {s.exit_code for s in steps}
    return 1 if 1 in codes else 2 if 2 in codes else 0
