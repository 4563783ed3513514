"""Greedy answers to several questions about one image: what they have in common goes through the language model once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rice_eval.errors import PlanError
from rice_eval.mllm.conversation import Request
from rice_eval.mllm.generate import decode, left_padded
from rice_eval.mllm.model import Mllm

__all__ = ["answer", "groups"]

AT_ONCE = 16
"""Questions that run together."""


def groups(requests: Sequence[Request], limit: int = AT_ONCE) -> list[list[int]]:
    """Positions of consecutive requests about the same images (the same objects), at most ``limit`` a group."""
    out: list[list[int]] = []
    for n, request in enumerate(requests):
        if out and len(out[-1]) < limit:
            before = requests[out[-1][0]]
            same = len(before.images) == len(request.images) and before.system == request.system
            if same and all(a is b for a, b in zip(before.images, request.images)):
                out[-1].append(n)
                continue
        out.append([n])
    return out


@torch.inference_mode()
def answer(
    mllm: Mllm,
    requests: Sequence[Request],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    advance: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """``Mllm.generate``'s answers; faster where several requests are about one image and share their first words.

    Args:
        mllm: the model.
        requests: in any order; those about one image should follow each other and hold the very same image object.
        max_new_tokens: an answer's tokens at most.
        stop: an answer is cut before the first of these.
        advance: called with the number of requests answered.

    Raises:
        DataError: an image the tiler can't open or cut.
        PlanError: a request longer than the language model's context.
    """
    # The same question about the same image has the same answer: without images, that is most questions.
    same: dict[tuple[object, ...], int] = {}
    first = [same.setdefault((r.prompt, r.system, r.raw, *map(id, r.images)), n) for n, r in enumerate(requests)]
    new = sorted(set(first))
    said: dict[int, str] = {}
    for group in groups([requests[n] for n in new]):
        rows = _greedy(mllm, [requests[new[k]] for k in group], max_new_tokens)
        for k, row in zip(group, rows):
            said[new[k]] = decode(mllm.chat.tokenizer, row, mllm.chat.stops, stop)
        advance(len(group))
    advance(len(requests) - len(new))
    return [said[n] for n in first]


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; each keeps at least one of its own."""
    most = min(len(row) for row in rows) - 1
    return next((k for k in range(most) if any(row[k] != rows[0][k] for row in rows)), most)


def _greedy(mllm: Mllm, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
    """New tokens of each request, what ended it included."""
    ids = [mllm.chat.ask(request) for request in requests]
    shared = _common(ids)
    if ids[0][:shared].count(mllm.chat.image_id) < len(requests[0].images):
        return mllm.tokens(requests, max_new_tokens, len(requests))
    model: Any = mllm.lm.model
    images = mllm.image_tokens(requests[0].images)
    tails = [mllm.embed(row[shared:], []) for row in ids]
    embeds, mask = left_padded(tails)
    count = len(requests)
    past, before = None, 0
    if shared:
        prefix = mllm.embed(ids[0][:shared], images)
        before = prefix.shape[0]
        past = model(inputs_embeds=prefix[None], use_cache=True, logits_to_keep=1).past_key_values
        past.batch_repeat_interleave(count)
    room = mllm.lm.context
    if room is not None and before + embeds.shape[1] + max_new_tokens > room:
        raise PlanError(
            f"a request of {before + embeds.shape[1]} tokens and an answer of {max_new_tokens}, where language model "
            f"'{mllm.lm.name}' has room for {room}",
            "use fewer image tokens, or choose another language model",
        )
    # Padding stands between what is shared and what is not; positions count what is no padding.
    mask = torch.cat([mask.new_ones(count, before), mask], dim=1)
    places = (mask.cumsum(1) - 1).clamp_min(0)[:, before:]
    rows: list[list[int]] = [[] for _ in requests]
    open_ = torch.ones(count, dtype=torch.bool, device=mask.device)
    ends = torch.tensor(mllm.chat.stops or (-1,), device=mask.device)
    for _ in range(max_new_tokens):
        said = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=places,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
        )
        past = said.past_key_values
        chosen: Tensor = said.logits[:, -1].argmax(-1)
        for n in range(count):
            if open_[n]:
                rows[n].append(int(chosen[n]))
        open_ &= ~torch.isin(chosen, ends)
        if not bool(open_.any()):
            break
        embeds = model.get_input_embeddings()(chosen)[:, None]
        mask = torch.cat([mask, mask.new_ones(count, 1)], dim=1)
        places = places[:, -1:] + 1
    return rows
