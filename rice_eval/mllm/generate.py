"""Greedy decoding over embeddings, many requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["decode", "greedy", "left_padded"]


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(L_i, D)`` rows as ``(B, L, D)`` with zeros on the left, and the ``(B, L)`` mask of what is no padding."""
    most = max(r.shape[0] for r in rows)
    embeds = rows[0].new_zeros(len(rows), most, rows[0].shape[1])
    mask = torch.zeros(len(rows), most, dtype=torch.long, device=rows[0].device)
    for n, row in enumerate(rows):
        embeds[n, most - row.shape[0] :] = row
        mask[n, most - row.shape[0] :] = 1
    return embeds, mask


def greedy(model: Any, embeds: Tensor, mask: Tensor, max_new_tokens: int, stops: Sequence[int]) -> list[list[int]]:
    """The likeliest token again and again, with a cache of keys and values.

    Args:
        model: a causal language model of transformers.
        embeds: ``(B, L, D)``, padded on the left.
        mask: ``(B, L)``, 1 where there is no padding.
        max_new_tokens: at most so many.
        stops: a sequence ends with the first of these, which is kept.

    Returns:
        New tokens of each row, nothing after the one that ended it.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else 0,
    )
    out = model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings)
    rows: list[list[int]] = out.tolist()
    ends = set(stops)
    cut = []
    for row in rows:
        last = next((n for n, token in enumerate(row) if token in ends), len(row) - 1)
        cut.append(row[: last + 1])
    return cut


def decode(tokenizer: Any, ids: Sequence[int], stops: Sequence[int], until: Sequence[str]) -> str:
    """An answer in words: without what ended it, without special tokens, cut before the first of ``until``, stripped."""
    words = [i for i in ids if i not in set(stops)]
    text = str(tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    for mark in until:
        if mark:
            text = text.split(mark, 1)[0]
    return text.strip()
