"""lmms-eval as the judge, in a process of its own: in this environment, or in the one of another Python."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rice_eval.errors import DataError, MissingExtraError, PlanError, one_line

__all__ = ["LmmsRun", "answers_of", "check_online", "lmms_version", "python_for", "run_lmms"]

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_ASK = "import importlib.metadata as m; import rice_eval; print(m.version('lmms-eval'))"


def python_for(python: Path | None) -> Path:
    """The interpreter that runs lmms-eval: the one given, else this one.

    Raises:
        MissingExtraError: lmms-eval, or this package, is not installed there.
    """
    chosen = python if python is not None else Path(sys.executable)
    lmms_version(chosen)
    return chosen


@lru_cache(maxsize=4)
def lmms_version(python: Path) -> str:
    """Version of lmms-eval in the environment of ``python``.

    Raises:
        MissingExtraError: it is not installed there, or this package is not.
    """
    try:
        done = subprocess.run([str(python), "-c", _ASK], capture_output=True, text=True, timeout=300)
    except OSError as error:
        raise MissingExtraError(
            f"--lmms-python {python}: can't be run ({error.strerror})", "give the python of an environment"
        ) from error
    if done.returncode == 0:
        return done.stdout.strip()
    last = one_line(done.stderr).rsplit(" ", 12)
    package = "rice-eval" if "rice_eval" in " ".join(last) else "lmms-eval"
    raise MissingExtraError(
        f"judging by lmms-eval needs the package '{package}', which is not installed for {python}",
        "pip install 'rice-eval[mllm]', in an environment of its own named with --lmms-python where its pins don't fit this one",
    )


def check_online(task: str, network: bool) -> None:
    """Refuse a task that fetches its data where the hub is switched off.

    Raises:
        PlanError: it needs the network.
    """
    off = [name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if network and off:
        raise PlanError(
            f"task '{task}' fetches its data from the hub, and {off[0]} switches the hub off",
            "unset it, or evaluate on mllm/scenes-vqa, which needs no network",
        )


@dataclass(frozen=True)
class LmmsRun:
    """What one run of lmms-eval left.

    Attributes:
        version: of lmms-eval.
        task: the task's id.
        task_version: as the task states it.
        task_hash: sha256 of the task's configuration as lmms-eval resolved it.
        documents_hash: lmms-eval's own hash over the documents.
        scores: metric -> value, as lmms-eval aggregates them.
        samples: one entry a document, as logged, in the order of the documents.
        prompts_sha256: over the documents' ids, prompts and targets, in order.
        log: the log's bytes.
    """

    version: str
    task: str
    task_version: str
    task_hash: str
    documents_hash: str
    scores: Mapping[str, float]
    samples: tuple[dict[str, Any], ...]
    prompts_sha256: str
    log: bytes


def run_lmms(
    python: Path,
    model_args: Mapping[str, str],
    task: str,
    *,
    include: Path | None = None,
    limit: int | None = None,
    processes: int = 1,
) -> LmmsRun:
    """Run lmms-eval's own command line with ``--model rice_eval``.

    Args:
        python: interpreter of the environment that has it.
        model_args: of ``rice_eval.mllm.lmms_model.RiceEval``.
        task: id of one task.
        include: folder with tasks of one's own.
        limit: only the first so many documents.
        processes: data-parallel processes on this machine, started by accelerate.

    Raises:
        MissingExtraError: lmms-eval is not installed there.
        DataError: it failed; the last line it said is in the message.
    """
    version = lmms_version(python)
    with tempfile.TemporaryDirectory(prefix="rice-eval-lmms-") as name:
        out = Path(name)
        start = [str(python), "-m"]
        if processes > 1:
            start += ["accelerate.commands.launch", "--num_processes", str(processes), "-m"]
        command = [
            *start,
            "lmms_eval",
            "--model",
            "rice_eval",
            "--model_args",
            ",".join(f"{k}={v}" for k, v in model_args.items()),
            "--tasks",
            task,
            "--batch_size",  # questions of one image run together whatever it is
            "1",
            "--log_samples",
            "--output_path",
            str(out / "out"),
        ]
        command += ["--include_path", str(include)] if include is not None else []
        command += ["--limit", str(limit)] if limit is not None else []
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if include is not None:
            # Local files alone: no data are asked of a hub, and nothing stays in the user's cache.
            env |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache")}
            if Path(model_args.get("model", "")).expanduser().exists():
                env["HF_HUB_OFFLINE"] = "1"
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        return _read(out / "out", task, version, done)


def _read(out: Path, task: str, version: str, done: subprocess.CompletedProcess[str]) -> LmmsRun:
    results = sorted(out.rglob("*_results.json"))
    logs = sorted(out.rglob(f"*_samples_{task}.jsonl"))
    if done.returncode != 0 or not results or not logs:
        lines = [line for line in (done.stderr + "\n" + done.stdout).splitlines() if "rror" in line]
        said = one_line(lines[-1])[:300] if lines else f"it ended with {done.returncode} and wrote no result"
        raise DataError(f"lmms-eval {version} failed on task '{task}': {said}", "run it by hand to see all it says")
    told = json.loads(results[-1].read_text(encoding="utf-8"))
    log = logs[-1].read_bytes()
    samples = [json.loads(line) for line in log.decode("utf-8").splitlines() if line.strip()]
    samples.sort(key=lambda s: int(s.get("doc_id", 0)))
    config = told.get("configs", {}).get(task, {})
    # Paths of this run are no part of what the task is, nor are the places in memory that functions are printed with.
    kept = {k: v for k, v in config.items() if k not in ("dataset_kwargs", "model_specific_generation_kwargs")}
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", json.dumps(kept, sort_keys=True, default=str))
    return LmmsRun(
        version=version,
        task=task,
        task_version=str(told.get("versions", {}).get(task, "")),
        task_hash=hashlib.sha256(text.encode()).hexdigest()[:16],
        documents_hash=str(told.get("task_hashes", {}).get(task, "")),
        scores=_scores(told.get("results", {}).get(task, {})),
        samples=tuple(samples),
        prompts_sha256=hashlib.sha256("\n".join(_asked(s) for s in samples).encode()).hexdigest(),
        log=log,
    )


def _scores(found: Mapping[str, Any]) -> dict[str, float]:
    """``metric,filter`` -> ``metric``; standard errors and names are left out."""
    return {
        name.partition(",")[0]: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in name
    }


def _asked(sample: Mapping[str, Any]) -> str:
    """What a document asked: id, prompt and target, whatever the version calls the prompt."""
    prompt = sample.get("input", sample.get("arguments"))
    return json.dumps([sample.get("doc_id"), prompt, sample.get("target")], sort_keys=True, default=str)


def answers_of(run: LmmsRun) -> list[str]:
    """What the model said to each document, in their order.

    Raises:
        DataError: a log without answers.
    """
    out = []
    for sample in run.samples:
        said: Any = sample.get("filtered_resps", sample.get("resps"))
        while isinstance(said, Sequence) and not isinstance(said, str) and said:
            said = said[0]
        if not isinstance(said, str):
            raise DataError(
                f"lmms-eval's log of '{run.task}' holds no answers", f"lmms-eval {run.version} is not known"
            )
        out.append(said)
    return out
