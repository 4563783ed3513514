"""LLaVA's training data: a JSON list (or one JSON object a line) of conversations, images in a folder beside it.

An entry has ``conversations``, a list of ``{"from": "human" | "gpt" | "system", "value": …}``, and ``image`` (one path or a
list) where it is about images; ``<image>`` marks where they stand. A single mark inside a turn moves to its start, on a line
of its own (LLaVA-NeXT, ``preprocess_multimodal``).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch

from rice_eval.errors import DataError
from rice_eval.mllm.conversation import IMAGE, Example, Turn
from rice_eval.mllm.tiling import open_image

__all__ = ["LlavaData", "batches"]

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class LlavaData:
    """Conversations by number; images are opened when they are asked for.

    Args:
        path: the ``.json`` or ``.jsonl`` file.
        images: the folder image paths are relative to; None for a file that has none.
        plain: captions of stage 1: nothing but images and the last turn's words (see ``Example.plain``).

    Attributes:
        fingerprint: sha256 of the file.

    Raises:
        DataError: a file that is not such a list, with the number of the entry.
    """

    def __init__(self, path: Path, images: Path | None, *, plain: bool = False) -> None:
        self.path, self.folder, self.plain = path, images, plain
        try:
            raw = path.read_bytes()
            text = raw.decode("utf-8")
            if path.suffix == ".jsonl":
                entries: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
            else:
                entries = json.loads(text)
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror})", "check the path") from error
        except ValueError as error:
            raise DataError(f"{path}: no JSON ({str(error)[:100]})", "save it again") from error
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{path}: no list of conversations", "see docs/mllm.md for the format")
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        self._entries = [self._checked(n, entry) for n, entry in enumerate(entries)]

    def _checked(self, number: int, entry: Any) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
        where = f"{self.path}, entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise DataError(f"{where}: has no list 'conversations'", "mend or drop the entry")
        turns = []
        for said in entry["conversations"]:
            role = _ROLES.get(str(said.get("from"))) if isinstance(said, dict) else None
            if role is None or not isinstance(said.get("value"), str):
                raise DataError(
                    f"{where}: a turn needs 'from' (human, gpt, system) and 'value'", "mend or drop the entry"
                )
            turns.append(Turn(role, _leading(said["value"])))
        named = entry.get("image", entry.get("images")) or []
        images = [named] if isinstance(named, str) else named
        if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
            raise DataError(f"{where}: 'image' is neither a path nor a list of paths", "mend or drop the entry")
        if images and self.folder is None:
            raise DataError(f"{where}: names the image {images[0]}", "give the folder of the images")
        marks = sum(t.text.count(IMAGE) for t in turns)
        if marks and marks != len(images):
            raise DataError(f"{where}: {marks} {IMAGE} marks and {len(images)} images", "mend or drop the entry")
        if not turns or turns[-1].role != "assistant" or not turns[-1].text.strip():
            raise DataError(f"{where}: does not end with an answer", "mend or drop the entry")
        return tuple(turns), tuple(images)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: int) -> Example:
        """The conversation, images opened.

        Raises:
            DataError: an image that is missing or can't be decoded.
        """
        turns, names = self._entries[number]
        folder = self.folder or Path()
        return Example(turns, tuple(open_image(folder / name) for name in names), plain=self.plain)

    def words(self, number: int) -> int:
        """Length for grouping: words of all turns, below zero where there is no image (LLaVA's ``modality_lengths``)."""
        turns, names = self._entries[number]
        count = sum(len(t.text.split()) for t in turns)
        return count if names else -max(1, count)


def _leading(text: str) -> str:
    if text.count(IMAGE) != 1 or text.startswith(IMAGE):
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def batches(data: LlavaData, batch: int, *, grouped: bool, seed: int, epoch: int) -> list[list[int]]:
    """Numbers of the entries of every step of an epoch; what does not fill a last batch is left out.

    Args:
        data: the conversations.
        batch: entries a step, over all processes.
        grouped: whether a batch holds either images or none, and neighbours of like length (LLaVA's
            ``group_by_modality_length``).
        seed, epoch: the order depends on nothing else.

    Returns:
        Batches of ``batch`` numbers each; with less data than one batch, one smaller batch.
    """
    draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(data), generator=draw).tolist()
    if len(order) < batch:
        return [order]
    if not grouped:
        return [order[n : n + batch] for n in range(0, len(order) - batch + 1, batch)]
    kinds = [n for n in order if data.words(n) > 0], [n for n in order if data.words(n) < 0]
    full, rest = [], []
    for kind in kinds:
        whole = len(kind) // batch * batch
        full += [sorted(kind[n : n + batch], key=lambda i: -abs(data.words(i))) for n in range(0, whole, batch)]
        rest += kind[whole:]
    full += [rest[n : n + batch] for n in range(0, len(rest) - batch + 1, batch)]
    return [full[n] for n in torch.randperm(len(full), generator=draw).tolist()]
