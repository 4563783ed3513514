"""Several questions about one image, each read as if it were asked alone: the image goes through the language model once.

A question of the test split stands behind the image with nothing between. In a conversation the second question stands behind the
first one and its answer, which is another task. So the questions of a visit are branches: each sees the words before the image, the
image and itself, at the positions it would have alone, and none of the others. All branches of all images of a step are one
sequence, so that nothing is padded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rice_eval.errors import UsageError
from rice_eval.mllm.chat import IGNORE
from rice_eval.mllm.conversation import Example
from rice_eval.mllm.model import Mllm

__all__ = ["Branches"]


@dataclass(frozen=True)
class _Branch:
    """Token ids behind the image, and their labels (``IGNORE`` outside the assistant's words)."""

    ids: list[int]
    labels: list[int]


class Branches:
    """The loss of a frozen language model over branches; what stands before the image is read once in a lifetime.

    Args:
        mllm: its language model must take an additive mask of four dimensions, as transformers' own classes do.
    """

    def __init__(self, mllm: Mllm) -> None:
        self.mllm = mllm
        self._begun: tuple[list[int], Any] = ([], None)

    def loss(self, visits: Sequence[Sequence[Example]]) -> Tensor:
        """Mean over all questions of the mean cross-entropy of an answer's tokens (and what ends it): a long answer counts like
        a short one.

        Args:
            visits: for each image its questions: conversations of one turn each about the very same image object.

        Raises:
            UsageError: questions with different words before the image.
            PlanError: more than the language model's context.
        """
        heads, branches = self._taught(visits)
        images = self.mllm.image_tokens([visit[0].images[0] for visit in visits])
        before, past = self._read(heads)
        embeds, places, mask = self._laid_out(images, branches, before)
        wanted, weights, at = self._answers(images, branches)
        logits = self.mllm.lm.model(
            inputs_embeds=embeds[None],
            position_ids=places[None],
            attention_mask=mask[None, None],
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=at,
        ).logits[0]
        return (nn.functional.cross_entropy(logits.float(), wanted, reduction="none") * weights).sum()

    def _taught(self, visits: Sequence[Sequence[Example]]) -> tuple[list[int], list[list[_Branch]]]:
        chat = self.mllm.chat
        heads: list[list[int]] = []
        branches = []
        for visit in visits:
            own = []
            for example in visit:
                ids, labels = chat.learn(example)
                at = ids.index(chat.image_id)
                heads.append(ids[:at])
                own.append(_Branch(ids[at + 1 :], labels[at + 1 :]))
            branches.append(own)
        if any(head != heads[0] for head in heads):
            raise UsageError("all questions of a step need the same words before the image", "put images first")
        return heads[0], branches

    @torch.no_grad()
    def _read(self, ids: list[int]) -> tuple[int, Any]:
        """How many words stand before the image, and their keys and values; a copy, since a forward adds to what it is given."""
        if not ids:
            return 0, None
        if self._begun[0] != ids:
            embeds = self.mllm.embed(ids, [])[None]
            past = self.mllm.lm.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values
            self._begun = (list(ids), past)
        return len(ids), copy.deepcopy(self._begun[1])

    def _laid_out(
        self, images: Sequence[Tensor], branches: Sequence[Sequence[_Branch]], before: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings ``(L, D_lm)``, positions ``(L,)`` and the additive mask ``(L, before + L)``."""
        lengths = [len(image) + sum(len(b.ids) for b in own) for image, own in zip(images, branches)]
        device, total = self.mllm.device, sum(lengths)
        longest = max(len(i) + max(len(b.ids) for b in own) for i, own in zip(images, branches))
        self.mllm.check_room(before + longest)
        open_ = torch.zeros(total, before + total, dtype=torch.bool, device=device)
        open_[:, :before] = True
        places = torch.empty(total, dtype=torch.long, device=device)
        pieces, start = [], 0
        for image, own in zip(images, branches):
            behind = start + len(image)
            places[start:behind] = torch.arange(before, before + len(image), device=device)
            _see_back(open_, before, start, behind)
            pieces.append(image)
            at = behind
            for branch in own:
                end = at + len(branch.ids)
                first = before + len(image)
                places[at:end] = torch.arange(first, first + end - at, device=device)
                open_[at:end, before + start : before + behind] = True
                _see_back(open_, before, at, end)
                pieces.append(self.mllm.embed(branch.ids, []))
                at = end
            start = at
        dtype = self.mllm.lm.dtype
        mask = torch.zeros(open_.shape, dtype=dtype, device=device).masked_fill_(~open_, torch.finfo(dtype).min)
        return torch.cat(pieces), places, mask

    def _answers(
        self, images: Sequence[Tensor], branches: Sequence[Sequence[_Branch]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of all answers, the weight of each, and the position whose logits guess it."""
        wanted: list[int] = []
        weights: list[float] = []
        at: list[int] = []
        start, count = 0, sum(len(own) for own in branches)
        for image, own in zip(images, branches):
            start += len(image)
            for branch in own:
                taught = [n for n, label in enumerate(branch.labels) if label != IGNORE]
                wanted += [branch.labels[n] for n in taught]
                weights += [1 / (count * len(taught))] * len(taught)
                at += [start + n - 1 for n in taught]
                start += len(branch.ids)
        device = self.mllm.device
        return (
            torch.tensor(wanted, device=device),
            torch.tensor(weights, device=device),
            torch.tensor(at, device=device),
        )


def _see_back(open_: Tensor, before: int, start: int, end: int) -> None:
    """Positions ``start`` to ``end`` see themselves and those of them that come before."""
    count = end - start
    open_[start:end, before + start : before + end] = torch.ones(
        count, count, dtype=torch.bool, device=open_.device
    ).tril()
