"""CTC heads on sequences of frozen tokens: many linear heads side by side, greedy decoding, prefix beam search.

Class 0 is the blank (Graves et al., ICML 2006). A token may emit several steps: its D features map linearly to K * C logits,
since a line has about as many characters as tokens and CTC needs a step for every character and one between equal ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rice_eval.probes.linear import ManyHeads, Moments

__all__ = ["CtcGroup", "beam_search", "best_path", "needed_steps", "split_steps"]

_FLOOR = -1e30  # stands for log 0 where two of them are added


def needed_steps(target: Sequence[int]) -> int:
    """Steps that CTC needs at least: one a character, and a blank between equal neighbours."""
    return len(target) + sum(a == b for a, b in itertools.pairwise(target))


def split_steps(logits: Tensor, steps: int) -> Tensor:
    """``(..., T, K * C)`` logits of tokens -> ``(..., T * K, C)`` of steps, in reading order."""
    *lead, tokens, columns = logits.shape
    return logits.reshape(*lead, tokens * steps, columns // steps)


def best_path(logits: Tensor) -> list[int]:
    """Greedy decoding: the best class of each step, repeats merged, blanks dropped.

    Args:
        logits: ``(T, C)``, class 0 the blank.
    """
    merged = torch.unique_consecutive(logits.argmax(dim=-1))
    return [int(c) for c in merged if c]


def beam_search(logits: Tensor, width: int, reach: int = 12) -> list[int]:
    """Prefix beam search without a lexicon: the labelling with the largest sum over its paths, as far as the beam sees.

    Args:
        logits: ``(T, C)``, class 0 the blank.
        width: prefixes kept after each step.
        reach: classes looked at in each step, the best ones; with C or more and a wide beam the search is exact.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1).cpu()
    values, classes = log_p.topk(min(reach, log_p.shape[1]), dim=-1)
    # prefix -> (log p of its paths that end in a blank, in its last character)
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, _FLOOR)}
    for step, (row, tops) in enumerate(zip(values.tolist(), classes.tolist())):
        blank_p = float(log_p[step, 0])
        after: dict[tuple[int, ...], list[float]] = {}
        for prefix, (blank, char) in beams.items():
            total = _add(blank, char)
            held = after.setdefault(prefix, [_FLOOR, _FLOOR])
            held[0] = _add(held[0], total + blank_p)
            if prefix:
                held[1] = _add(held[1], char + float(log_p[step, prefix[-1]]))
            for p, c in zip(row, tops):
                if c == 0:
                    continue
                grown = after.setdefault((*prefix, c), [_FLOOR, _FLOOR])
                # A repeat grows the prefix only across a blank.
                grown[1] = _add(grown[1], (blank if prefix and prefix[-1] == c else total) + p)
        kept = sorted(after.items(), key=lambda item: _add(*item[1]), reverse=True)[:width]
        beams = {prefix: (b, c) for prefix, (b, c) in kept}
    return list(max(beams.items(), key=lambda item: _add(*item[1]))[0])


def _add(a: float, b: float) -> float:
    """log(exp a + exp b)."""
    high, low = (a, b) if a >= b else (b, a)
    return high if low <= _FLOOR else high + math.log1p(math.exp(low - high))


class CtcGroup(ManyHeads):
    """``ManyHeads`` of K * C outputs that read the same layer, trained on the same lines by CTC.

    Args:
        moments: of the lines' features.
        classes: C, the blank among them.
        steps: K, CTC steps a token.
        rates, decays, betas, norm_eps, device: see ``ManyHeads``.
    """

    def __init__(
        self,
        moments: Moments,
        classes: int,
        steps: int,
        rates: tuple[float, ...],
        decays: tuple[float, ...],
        betas: tuple[float, float],
        norm_eps: float,
        device: torch.device,
    ) -> None:
        super().__init__(moments, steps * classes, rates, decays, betas, norm_eps, device)
        self.classes, self.steps = classes, steps

    def logits(self, features: Tensor) -> Tensor:
        """``(T, D)`` features of one line -> ``(H, T * K, C)`` logits."""
        flat = self.outputs(self.standardised(features))
        return split_steps(flat.view(-1, self.heads, self.width).transpose(0, 1), self.steps)

    def step(self, features: Sequence[Tensor], targets: Sequence[Sequence[int]], factor: float) -> Tensor:
        """One step of every head on a batch of lines.

        Args:
            features: B tensors ``(T_b, D)``.
            targets: B sequences of classes from 1.
            factor: of the learning rates.

        Returns:
            ``(H,)`` mean losses a line before the step. Lines with fewer steps than CTC needs add nothing.
        """
        lengths = [int(f.shape[0]) for f in features]
        x = self.standardised(torch.cat([f.to(self.device, torch.float32) for f in features]))
        flat = self.outputs(x)
        # Only the logits carry a graph: the gradient of a linear map is written out.
        flat.requires_grad_(True)
        longest, batch = max(lengths), len(features)
        with torch.enable_grad():
            parts = torch.split(flat, lengths)
            padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
            # (B, T, H, K, C) -> (T * K, B * H, C)
            shaped = padded.view(batch, longest, self.heads, self.steps, self.classes).permute(1, 3, 0, 2, 4)
            log_p = torch.log_softmax(shaped.reshape(longest * self.steps, batch * self.heads, self.classes), dim=-1)
            # Without the type a batch whose every target is empty would be of floats.
            flat_targets = torch.tensor(
                [c for t in targets for _ in range(self.heads) for c in t], dtype=torch.long, device=self.device
            )
            sizes = torch.tensor([len(t) for t in targets for _ in range(self.heads)], dtype=torch.long)
            inputs = torch.tensor([n * self.steps for n in lengths for _ in range(self.heads)], dtype=torch.long)
            loss = F.ctc_loss(log_p, flat_targets, inputs, sizes, reduction="none", zero_infinity=True)
            per_head = loss.view(batch, self.heads).mean(dim=0)
            (gradient,) = torch.autograd.grad(per_head.sum(), flat)
        with torch.no_grad():
            self.update(x, gradient, factor)
        return per_head.detach()
