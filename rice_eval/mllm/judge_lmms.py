"""A probe judged by lmms-eval: the same questions, the same scoring, in lmms-eval's own process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rice_eval.datasets.base import Dataset
from rice_eval.errors import DataError
from rice_eval.mllm.bundle import write_bundle
from rice_eval.mllm.judge import CONTROLS, Sample
from rice_eval.mllm.lmms import answers_of, python_for, run_lmms
from rice_eval.mllm.lmms_task import write_task
from rice_eval.mllm.vqa import Asked

__all__ = ["ask_lmms", "judged_by_lmms"]


def judged_by_lmms(
    python: Path,
    test: Dataset,
    questions: Sequence[Asked],
    bundle: Mapping[str, bytes],
    progress: Callable[[str, int], Callable[[int], None]],
) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """Every control of a probe that was just trained; see ``ask_lmms``.

    Args:
        python: interpreter of the environment that has lmms-eval.
        test: the split.
        questions: of the split, in its order.
        bundle: files of the trained probe.
        progress: opens a bar.
    """
    with tempfile.TemporaryDirectory(prefix="rice-eval-model-") as folder:
        model = write_bundle(Path(folder) / "model", bundle)
        return ask_lmms(python, test, questions, {"model": str(model)}, advance=progress("lmms-eval", len(CONTROLS)))


def ask_lmms(
    python: Path,
    test: Dataset,
    questions: Sequence[Asked],
    model_args: Mapping[str, str],
    controls: Sequence[str] = CONTROLS,
    processes: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """Put an embedded split's questions through lmms-eval's command line.

    Args:
        python: interpreter of the environment that has lmms-eval.
        test: the split, written as a local task.
        questions: of the split, in its order.
        model_args: of ``rice_eval.mllm.lmms_model.RiceEval``, but the control.
        controls: those to run, one after the other.
        processes: data-parallel processes.
        advance: called after each control.

    Returns:
        control -> samples, and the record's ``judge``.

    Raises:
        MissingExtraError: lmms-eval is not installed there.
        DataError: it failed, or scored an answer otherwise than this package does.
    """
    chosen = python_for(python)
    name = test.name.replace("-", "_")
    samples: dict[str, list[Sample]] = {}
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rice-eval-task-") as folder:
        task = write_task(test, Path(folder), name)
        for control in controls:
            args = {**model_args, **({"control": control} if control else {})}
            run = run_lmms(chosen, args, name, include=task, processes=processes)
            answers = answers_of(run)
            if len(answers) != len(questions):
                raise DataError(
                    f"lmms-eval answered {len(answers)} of {len(questions)} questions", "run the evaluation again"
                )
            samples[control] = [
                Sample(q.id, q.image_id, q.kind, q.prompt, q.answer, a) for q, a in zip(questions, answers, strict=True)
            ]
            right = 100 * sum(s.right for s in samples[control]) / len(questions)
            theirs = 100 * run.scores.get("accuracy", float("nan"))
            if not abs(right - theirs) < 1e-6:
                raise DataError(
                    f"lmms-eval scores {theirs:.4f} % where the same answers are {right:.4f} % right here",
                    "report it with both versions",
                )
            told = {
                "name": "lmms-eval",
                "version": run.version,
                "task": run.task,
                "task_version": run.task_version,
                "task_hash": run.task_hash,
            }
            advance(1)
    return samples, told
