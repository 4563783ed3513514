"""A model to judge, from its folder: a trained probe, what a recipe trained, or a published checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rice_eval.adapters.base import facts_as_dict
from rice_eval.datasets.base import Dataset
from rice_eval.mllm.bundle import MANIFEST, load_bundle, seen_as
from rice_eval.mllm.conversation import Picture
from rice_eval.mllm.judge import CONTROLS, Sample, ask_all
from rice_eval.mllm.model import Mllm
from rice_eval.mllm.parts import load_model
from rice_eval.mllm.vqa import Asked

__all__ = ["Loaded", "ask_here", "controls_of", "load"]


@dataclass(frozen=True)
class Loaded:
    """A model and how it was trained to be asked.

    Attributes:
        mllm: the model.
        stored: the number format of the bank a probe was trained on; None where the model is no probe.
        tuned: parts that were trained here; ``checkpoint`` where the model came trained.
    """

    mllm: Mllm
    stored: str | None
    tuned: tuple[str, ...]

    def show(self, image: Image.Image, control: str = "") -> Picture:
        """The image as the model saw images in training; ``mean_image`` shows a probe its training set's mean tokens."""
        shown: Picture = seen_as(self.mllm, image, self.stored, control)
        return shown

    def facts(self) -> dict[str, Any]:
        """What a record says of the model: a language model that was trained by its class, a frozen one by its weights."""
        lm = self.mllm.lm.facts()
        return {
            "mllm": self.mllm.facts(),
            "fingerprint": self.mllm.fingerprint(),
            "encoder": facts_as_dict(self.mllm.encoder.facts),
            "tuned": list(self.tuned),
            "lm": lm["sha256"] if self.tuned == ("projector",) else f"{lm['class']} {lm['params']}",
        }


def controls_of(model: str | Path) -> tuple[str, ...]:
    """The controls a model can be put to: the mean image is known of a trained probe alone."""
    return CONTROLS if (Path(model).expanduser() / MANIFEST).is_file() else CONTROLS[:2]


def load(model: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Loaded:
    """A model ready to be judged.

    Args:
        model: a trained probe's ``.files`` folder, a folder of ``rice-eval mllm llava``, or a LLaVA checkpoint.
        device: where it goes.
        dtype: of the language model.

    Raises:
        CheckpointError: none of these, or one that is not whole.
        PlanError: it does not fit into memory.
    """
    folder = Path(model).expanduser()
    if (folder / MANIFEST).is_file():
        mllm, told = load_bundle(folder, device, dtype)
        return Loaded(mllm, told.stored, told.tuned)
    mllm = load_model(model, device=device, dtype=dtype)
    tuned = tuple(sorted({part for recipe in mllm.tuned for part in recipe.tuned})) or ("checkpoint",)
    return Loaded(mllm, None, tuned)


def ask_here(
    model: str | Path,
    test: Dataset,
    questions: Sequence[Asked],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """Put an embedded split's questions to a model in this process, once with every control it can be put to.

    Args:
        model: see ``load``.
        test: the split.
        questions: of the split, in its order.
        device: where the model goes.
        dtype: of the language model.

    Returns:
        control -> samples, and ``Loaded.facts``.

    Raises:
        CheckpointError: the model can't be loaded.
    """
    loaded = load(model, device=device, dtype=dtype)

    def show(control: str, index: int) -> Picture:
        return loaded.show(Image.fromarray(test.image(index)), control)

    return {
        control: ask_all(loaded.mllm, questions, None if control == "blind" else partial(show, control))
        for control in controls_of(model)
    }, loaded.facts()
