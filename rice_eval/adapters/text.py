"""Tokenizers of text towers, from the folder of the weights or from the card's hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rice_eval.adapters.base import LoadRequest
from rice_eval.adapters.hub import locate
from rice_eval.adapters.tower import first_line, transformers_module
from rice_eval.errors import CheckpointError

__all__ = ["Words", "has_tokenizer"]

_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


class Words:
    """Texts to token ids, as the family was trained; the tokenizer is loaded when the first text comes.

    Args:
        folder: the folder of the weights.
        request: where the card's own tokenizer is, if the folder has none.
        context: longest sequence; longer texts are cut, as upstream does.
        pad_to_context: pad every text to ``context`` (SigLIP), or only to the longest of the batch (CLIP).
        lowercase: whether texts are lowered first.
    """

    def __init__(
        self, folder: Path, request: LoadRequest, *, context: int, pad_to_context: bool, lowercase: bool = False
    ) -> None:
        self._folder = folder
        self._request = request
        self._context = context
        self._padding: str | bool = "max_length" if pad_to_context else True
        self._lowercase = lowercase
        self._tokenizer: Any = None

    @property
    def available(self) -> bool:
        """Whether a tokenizer lies beside the weights or can be had from the card's repository."""
        return has_tokenizer(self._folder) or self._request.card.source.hub is not None

    def __call__(self, texts: list[str]) -> dict[str, Any]:
        """Inputs of the text tower: ``input_ids (B, L)`` and, where the tokenizer gives one, ``attention_mask (B, L)``.

        Raises:
            CheckpointError: no tokenizer, or one that can't be read.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load()
        if self._lowercase:
            texts = [text.lower() for text in texts]
        batch = self._tokenizer(
            texts, padding=self._padding, truncation=True, max_length=self._context, return_tensors="pt"
        )
        return {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}

    def _load(self) -> Any:
        folder = self._folder
        if not has_tokenizer(folder):
            if self._request.card.source.hub is None:
                raise CheckpointError(
                    f"{folder}: holds no tokenizer ({', '.join(_FILES)})",
                    "put the tokenizer's files beside the weights",
                )
            folder = Path(locate(LoadRequest(self._request.card, self._request.family)))
        library = transformers_module("embedding texts")
        try:
            return library.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=self._request.trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: its tokenizer can't be read ({first_line(error)})", "download the tokenizer's files again"
            ) from error
