"""Tiny random models of transformers, saved by the library itself, and tokenizers made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "photo", "of", "cat", "dog", "red", "car", "street", "the", "on"]
TEXTS = [
    "a photo of a cat",
    "The DOG on a street",
    "red car",
    "a photo of a red car on the street the street the street cat",
]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that every part shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def save_tokenizer(folder: Path, pooled_last: bool = False) -> None:
    """A word-level tokenizer with begin and end of text, written as tokenizer.json."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    names = ["input_ids"] if pooled_last else ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=names,
    ).save_pretrained(folder)


def images(height: int, width: int, count: int = 2, seed: int = 5) -> torch.Tensor:
    """``(count, 3, height, width)`` in [0, 1]."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
