"""What lmms-eval sees of this package: ``--model rice_eval`` (entry-point group ``lmms_eval.models``).

``lmms_eval`` finds ``manifest`` by its entry point and imports ``RiceEval`` when the model is asked for. Only lmms-eval imports
this module; the rest of the package never needs it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    lmms = object
else:
    from lmms_eval.api.model import lmms

__all__ = ["RiceEval", "manifest"]


def manifest() -> Any:
    """The ``ModelManifest`` of ``rice_eval``; what the entry point names."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="rice_eval", simple_class_path="rice_eval.mllm.lmms_model.RiceEval")


def _flag(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "yes")


class RiceEval(lmms):
    """A model of this package under lmms-eval.

    Args (``--model_args``):
        model: folder of a trained probe (``mllm.yaml``), or a LLaVA checkpoint that ``rice_eval.mllm.checkpoints`` reads.
        control: empty; ``blind`` leaves every image out; ``mean_image`` shows the training set's mean tokens (probes only).
        device: torch device.
        dtype: of the language model: ``float32``, ``bfloat16``, ``float16``.
        system: a system message in place of the one of training.
        facts: a file that is written with what the model is made of.
        max_new_tokens: replaces the task's own limit; 0 keeps it.
        batch_size: taken since lmms-eval gives it; questions run by image, whatever it is.
    """

    is_simple = True
    task_dict: dict[str, Any]
    rank: int

    def __init__(
        self,
        model: str = "",
        control: str = "",
        device: str | None = None,
        dtype: str = "float32",
        system: str | None = None,
        max_new_tokens: int | str = 0,
        facts: str = "",
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        from rice_eval.errors import UsageError
        from rice_eval.mllm.loaded import load

        unknown.pop("max_batch_size", None)
        if unknown:
            raise UsageError(
                f"--model_args: '{sorted(unknown)[0]}' is not known to rice_eval",
                "it takes model, control, device, dtype, system, facts, max_new_tokens",
            )
        if control not in ("", "blind", "mean_image"):
            raise UsageError(f"--model_args control={control}", "choose blind or mean_image, or leave it out")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = self._join(device)
        where = device if device not in (None, "", "None") else "cpu"
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise UsageError(f"--model_args dtype={dtype}", "choose float32, bfloat16 or float16")
        loaded = load(model, device=str(where), dtype=kind)
        if control == "mean_image" and loaded.stored is None:
            raise UsageError("--model_args control=mean_image", "only a trained probe knows its training set's mean")
        self.mllm, self.stored = loaded.mllm, loaded.stored
        self.system = system
        if facts and self.rank == 0:
            Path(facts).write_text(json.dumps(loaded.facts()), encoding="utf-8")
        self.control, self.limit = control, int(max_new_tokens)

    @property
    def device(self) -> torch.device:
        """Where the language model runs."""
        return self.mllm.device

    def _join(self, device: str | None) -> str:
        """One of several processes that accelerate started: lmms-eval gives each its share of the documents."""
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        return f"cuda:{self.accelerator.local_process_index}" if device == "cuda" else str(device or "cpu")

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests."""
        from rice_eval.mllm.answer import answer
        from rice_eval.mllm.conversation import Request

        out = [""] * len(requests)
        # Questions about one image follow each other, so that it goes through the encoder once.
        order = sorted(range(len(requests)), key=lambda n: (requests[n].args[4], _place(requests[n].args[3])))
        by_settings: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for n in order:
            settings = requests[n].args[1]
            most = self.limit or int(settings.get("max_new_tokens", 64))
            until = settings.get("until") or ()
            stops = (until,) if isinstance(until, str) else tuple(str(u) for u in until)
            by_settings.setdefault((most, stops), []).append(n)
        for (most, stops), places in by_settings.items():
            shown = self._images([self._visuals(requests[n]) for n in places])
            asked = [
                Request(str(requests[n].args[0]), images, self.system) for n, images in zip(places, shown, strict=True)
            ]
            for n, text in zip(places, answer(self.mllm, asked, most, stops), strict=True):
                out[n] = text
        return out

    def _visuals(self, request: Any) -> list[Any]:
        if self.control == "blind":
            return []
        _, _, doc_to_visual, doc_id, task, split = request.args
        return list(doc_to_visual(self.task_dict[task][split][doc_id]) or ())

    def _images(self, visuals: list[list[Any]]) -> list[tuple[Any, ...]]:
        """Equal images become one object, encoded once, rounded as the bank rounds them."""
        from rice_eval.mllm.bundle import seen_as

        kept: dict[bytes, Any] = {}
        out = []
        for row in visuals:
            images = []
            for image in row:
                key = image.convert("RGB").tobytes() + repr(image.size).encode()
                if key not in kept:
                    kept[key] = seen_as(self.mllm, image, self.stored, self.control)
                images.append(kept[key])
            out.append(tuple(images))
        return out

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered: every benchmark with a card here is generative."""
        raise NotImplementedError("rice_eval answers by generation; choose a generate_until task")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("rice_eval answers single-round tasks")


def _place(doc_id: Any) -> tuple[int, str]:
    return (int(doc_id), "") if str(doc_id).isdigit() else (0, str(doc_id))
