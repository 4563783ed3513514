"""From what a job asks for to the key of an entry, its shards and its bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.key import COMPUTES, BankKey, check_dtype
from rice_eval.datasets.base import Dataset
from rice_eval.errors import PlanError, UsageError
from rice_eval.views import View

__all__ = ["TYPICAL_SIZE", "bank_key", "shard_length", "tokens_bytes"]

TYPICAL_SIZE = (480, 640)
"""Height and width of COCO's usual image: what sizes are guessed from where a view depends on the image."""

_SHARD_BYTES = 128 << 20
"""What a shard aims at: small enough that a kill loses little and one shard fits any memory, large enough for a disk."""


def bank_key(
    facts: EncoderFacts,
    dataset: Dataset,
    view: str,
    layers: Sequence[int],
    norm: bool,
    dtype: str,
    autocast: str | None = None,
    compiled: bool = False,
) -> BankKey:
    """The key of a request; ``view`` is resolved for the encoder's patch and ``layers`` may count from the end.

    Raises:
        UsageError: a view, storage type or autocast type that does not exist.
        PlanError: a layer that does not exist.
    """
    numbers = sorted({facts.layers + 1 + n if n < 0 else n for n in layers})
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= facts.layers:
        raise PlanError(
            f"encoder '{facts.name}' has layers 1 to {facts.layers}, not {list(layers)}", f"ask for 1..{facts.layers}"
        )
    compute: Any = (autocast or "weights") + ("+compile" if compiled else "")
    if compute not in COMPUTES:
        raise UsageError(f"autocast to '{autocast}' is not known", "choose bf16 or fp16, or leave it out")
    red, green, blue = (min(255, max(0, round(255 * m))) for m in facts.mean)
    return BankKey(
        encoder=facts.sha256,
        dataset=dataset.fingerprint,
        view=str(View.parse(view).resolve(facts.patch)),
        layers=tuple(numbers),
        norm=norm,
        dtype=check_dtype(dtype),
        compute=compute,
        fill=(red, green, blue),
    )


def shard_length(facts: EncoderFacts, key: BankKey, images: int) -> int:
    """Images a shard: a power of two from 16 to 64 that comes near 128 MiB, fewer for small splits so that there are about eight.

    It depends on nothing but the request, so that every process and every machine cuts a split in the same way.
    """
    size = tokens_bytes(facts, key, TYPICAL_SIZE)
    fitting = 2 ** int(math.log2(max(1.0, _SHARD_BYTES / max(1, size))))
    eighth = 2 ** int(math.log2(max(1.0, images / 8)))
    return int(min(max(16, min(64, fitting)), max(8, eighth)))


def tokens_bytes(facts: EncoderFacts, key: BankKey, size: tuple[int, int]) -> int:
    """Bytes of the patch tokens of an image of ``(H, W)`` in the bank; class token and grids are left out."""
    each = {"fp16": 2, "bf16": 2, "fp32": 4, "int8": 1}[key.dtype]
    total = 0
    for frame in View.parse(key.view).frames(*size):
        for layer in key.layers:
            stride, width = facts.strides[layer - 1], facts.widths[layer - 1]
            count = (frame.size[0] // stride) * (frame.size[1] // stride)
            total += count * (width * each + (4 if key.dtype == "int8" else 0))
    return total
