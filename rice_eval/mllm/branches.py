"""Several questions about one image, each read as if it were asked alone: the image goes through the language model once.

A question of the test split stands behind the image with nothing between. In a conversation the second question stands behind the
first one and its answer, which is another task. So the questions of a visit are branches: each sees the words before the image, the
image and itself, at the positions it would have alone, and none of the others.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rice_eval.adapters.tower import first_line
from rice_eval.errors import PlanError, UsageError
from rice_eval.mllm.chat import IGNORE
from rice_eval.mllm.conversation import Example
from rice_eval.mllm.model import Mllm

__all__ = ["Branches"]

_APART = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""How far apart two losses may lie, relative: rounding of sums in another order gives 1e-5 and, in bfloat16, 0.5 %."""


@dataclass(frozen=True)
class _Branch:
    """Token ids behind the image, and their labels (``IGNORE`` outside the assistant's words)."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class _Row:
    """One image and its branches.

    Attributes:
        embeds: ``(L, D_lm)``.
        places: ``(L,)`` position of each.
        open_: ``(L, L)`` what each sees.
        at: positions whose logits guess an answer's tokens, rising.
        wanted, weights: those tokens, and what each counts in its answer.
    """

    embeds: Tensor
    places: Tensor
    open_: Tensor
    at: Tensor
    wanted: Tensor
    weights: Tensor


class Branches:
    """The loss of a frozen language model over branches; what stands before the image is read once in a lifetime.

    Args:
        mllm: its language model must take an additive mask of four dimensions, as transformers' own classes do.
    """

    def __init__(self, mllm: Mllm) -> None:
        self.mllm = mllm
        self._begun: tuple[list[int], Any] = ([], None)
        self._window = _window_of(mllm.lm.model.config.get_text_config())

    def check(self, visit: Sequence[Example]) -> None:
        """Hold the loss of one visit to that of its questions alone: not every language model can read branches.

        Args:
            visit: two questions or more about one image.

        Raises:
            PlanError: the language model takes no positions (alibi, state-space models), fails, or gives another loss.
        """
        lm = self.mllm.lm
        cannot = f"language model '{lm.name}' ({type(lm.model).__name__}) can't read several questions behind one image"
        choose = (
            "choose one with rotary or learned positions and a cache of keys and values, such as SmolLM2, Qwen or Llama"
        )
        if "position_ids" not in inspect.signature(lm.model.forward).parameters:
            raise PlanError(f"{cannot} (it takes no position_ids)", choose)
        try:
            with torch.no_grad():
                together = float(self.loss([visit]))
                alone = sum(float(self.mllm.loss([example])) for example in visit) / len(visit)
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise PlanError(f"{cannot} ({type(error).__name__}: {first_line(error)})", choose) from error
        if not abs(together - alone) <= _APART[lm.dtype] * abs(alone):
            raise PlanError(f"{cannot} (loss {together:.4g}, one by one {alone:.4g})", choose)

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
        before, past = self._read(heads, len(visits))
        rows = [self._row(image, own, before) for image, own in zip(images, branches)]
        length = max(len(row.embeds) for row in rows)
        dtype = self.mllm.lm.dtype
        # A padded position sees what stands before the image, so that no row of the softmax is empty, and nothing sees it.
        open_ = torch.zeros(len(rows), length, before + length, dtype=torch.bool, device=self.mllm.device)
        open_[:, :, :before] = True
        for n, row in enumerate(rows):
            size = len(row.embeds)
            open_[n, :size, before : before + size] = row.open_
            open_[n, size:, before + size :] |= not before
        mask = torch.zeros(open_.shape, dtype=dtype, device=open_.device).masked_fill_(~open_, torch.finfo(dtype).min)
        # Logits of the positions that some row answers at, and of no other: a vocabulary's width each.
        kept = torch.cat([row.at for row in rows]).unique()  # type: ignore[no-untyped-call]
        logits = self.mllm.lm.model(
            inputs_embeds=nn.utils.rnn.pad_sequence([row.embeds for row in rows], batch_first=True),
            position_ids=nn.utils.rnn.pad_sequence([row.places for row in rows], batch_first=True),
            attention_mask=mask[:, None],
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=kept,
        ).logits
        losses = [
            nn.functional.cross_entropy(own[torch.searchsorted(kept, row.at)].float(), row.wanted, reduction="none")
            for own, row in zip(logits, rows)
        ]
        questions = sum(len(own) for own in branches)
        return (torch.cat(losses) * torch.cat([row.weights for row in rows])).sum() / questions

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
    def _read(self, ids: list[int], times: int) -> tuple[int, Any]:
        """How many words stand before the images, and their keys and values for ``times`` rows; a copy, since a forward adds to it."""
        if not ids:
            return 0, None
        if self._begun[0] != ids:
            embeds = self.mllm.embed(ids, [])[None]
            past = self.mllm.lm.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values
            self._begun = (list(ids), past)
        past = copy.deepcopy(self._begun[1])
        past.batch_repeat_interleave(times)
        return len(ids), past

    def _row(self, image: Tensor, branches: Sequence[_Branch], before: int) -> _Row:
        """An image and its branches, one behind the other."""
        device, behind = self.mllm.device, len(image)
        total = behind + sum(len(branch.ids) for branch in branches)
        self.mllm.check_room(before + behind + max(len(branch.ids) for branch in branches))
        if self._window is not None and before + total > self._window:
            raise PlanError(
                f"language model '{self.mllm.lm.name}' sees {self._window} positions back; an image with its questions has "
                f"{before + total}",
                "lower --set turns or --set side, or choose another language model",
            )
        open_ = torch.zeros(total, total, dtype=torch.bool, device=device)
        open_[:, :behind] = True
        _see_back(open_, 0, behind)
        places = list(range(behind))
        pieces, at, wanted, weights = [image], [], [], []
        start = behind
        for branch in branches:
            end = start + len(branch.ids)
            _see_back(open_, start, end)
            places += range(behind, behind + end - start)
            pieces.append(self.mllm.embed(branch.ids, []))
            taught = [n for n, label in enumerate(branch.labels) if label != IGNORE]
            at += [start + n - 1 for n in taught]
            wanted += [branch.labels[n] for n in taught]
            weights += [1 / len(taught)] * len(taught)
            start = end
        return _Row(
            torch.cat(pieces),
            torch.tensor(places, device=device) + before,
            open_,
            torch.tensor(at, device=device),
            torch.tensor(wanted, device=device),
            torch.tensor(weights, device=device),
        )


def _window_of(config: Any) -> int | None:
    """Positions that a language model of local attention sees back; None where all layers see everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    local = kinds is None or any("sliding" in str(kind) for kind in kinds)
    used = getattr(config, "use_sliding_window", True)
    return int(window) if isinstance(window, int) and local and used else None


def _see_back(open_: Tensor, start: int, end: int) -> None:
    """Positions ``start`` to ``end`` see themselves and those of them that come before."""
    open_[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool, device=open_.device).tril()
