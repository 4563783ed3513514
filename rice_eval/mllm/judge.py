"""Judging a model on short-answer questions: with the image, without it, and with every image the same.

Questions and model are the same. ``blind`` leaves the image out; ``mean_image`` shows the training set's mean tokens in
its place, so that what the projector taught the language model about the form of answers stays, and only the sight is gone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from rice_eval.errors import DataError
from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.mllm.answer import answer
from rice_eval.mllm.conversation import Picture, Request
from rice_eval.mllm.model import Mllm
from rice_eval.mllm.score import exact
from rice_eval.mllm.vqa import Asked

__all__ = ["CONTROLS", "MAX_NEW_TOKENS", "Sample", "ask_all", "prompts_sha256", "samples_text", "statistics_of"]

MAX_NEW_TOKENS = 16
"""Longest answer: the longest word on a sign is far shorter in tokens."""

CONTROLS = ("", "blind", "mean_image")
"""With the image, without it, with the mean of the training set's in its place."""

Samples = Mapping[str, "Sequence[Sample]"]
"""control -> one sample a question, all in the same order."""


@dataclass(frozen=True)
class Sample:
    """One question as it was put and answered."""

    id: str
    image_id: str
    kind: str
    prompt: str
    truth: str
    answer: str

    @property
    def right(self) -> bool:
        """Exact match after ``normalise``."""
        return exact(self.answer, self.truth)


def ask_all(
    mllm: Mllm,
    questions: Sequence[Asked],
    images: Callable[[int], Picture] | None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Sample]:
    """Put every question to the model.

    Args:
        mllm: the model.
        questions: image by image.
        images: index of an image -> the image or its tokens; None leaves images out.
        advance: called with the number of questions answered.
    """
    requests = []
    shown: tuple[int, Picture] | None = None
    for q in questions:
        if images is not None and (shown is None or shown[0] != q.index):
            shown = (q.index, images(q.index))
        seen = (shown[1],) if images is not None and shown is not None else ()
        requests.append(Request(q.prompt, seen))
    answers = answer(mllm, requests, MAX_NEW_TOKENS, advance=advance)
    return [
        Sample(q.id, q.image_id, q.kind, q.prompt, q.answer, text) for q, text in zip(questions, answers, strict=True)
    ]


def statistics_of(samples: Samples, image_ids: Sequence[str]) -> RatioStatistics:
    """Accuracies over questions, per image: ``accuracy``, ``accuracy_KIND``, and the same of each control as ``CONTROL_…``.

    Args:
        samples: of every control.
        image_ids: of the whole split, in its order.

    Raises:
        DataError: controls that answered different questions.
    """
    asked = {control: [s.id for s in given] for control, given in samples.items()}
    first = next(iter(asked.values()))
    for control, ids in asked.items():
        if ids != first:
            raise DataError(f"control '{control}' answered other questions", "run the evaluation again")
    place = {name: n for n, name in enumerate(image_ids)}
    kinds = list(dict.fromkeys(s.kind for s in next(iter(samples.values()))))
    metrics = [f"{c}_{m}" if c else m for c in samples for m in ("accuracy", *(f"accuracy_{k}" for k in kinds))]
    column = {name: n for n, name in enumerate(metrics)}
    hits, counts = np.zeros((len(image_ids), len(metrics))), np.zeros((len(image_ids), len(metrics)))
    for control, given in samples.items():
        for sample in given:
            for name in ("accuracy", f"accuracy_{sample.kind}"):
                at = place[sample.image_id], column[f"{control}_{name}" if control else name]
                hits[at] += sample.right
                counts[at] += 1
    return RatioStatistics(tuple(image_ids), hits, counts, tuple(metrics))


def prompts_sha256(samples: Sequence[Sample]) -> str:
    """sha256 over ids, prompts and truths, in order: two runs that agree in it were asked the same."""
    lines = [json.dumps([s.id, s.prompt, s.truth], ensure_ascii=False) for s in samples]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def samples_text(samples: Samples) -> str:
    """The per-sample log: one JSON object a question and control."""
    lines = [
        json.dumps({"control": control, **asdict(sample), "right": sample.right}, ensure_ascii=False, sort_keys=True)
        for control, given in samples.items()
        for sample in given
    ]
    return "\n".join(lines) + "\n"
