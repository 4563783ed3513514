"""Language models."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["LanguageModel", "load_lm"]


class LanguageModel:
    """A causal language model of transformers and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    width: int

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights."""
        raise NotImplementedError


def load_lm(
    name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", trust_remote_code: bool = False
) -> LanguageModel:
    """``tiny-random``, ``smollm2-135m``, a folder, or a hub id."""
    raise NotImplementedError
