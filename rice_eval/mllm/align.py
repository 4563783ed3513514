"""Alignment: each image token learns the words of what it lies on, before a language model is asked to read any.

A frozen language model tells a projector little about sight while it can't read a single image token. Regions with a few words
each, as RefCOCO and Visual Genome have them, say which words belong to which cells of the grid; the projector learns to give
embeddings near those words' in the language model's own table. That takes no forward of the language model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rice_eval.datasets.base import Question
from rice_eval.errors import DataError
from rice_eval.mllm.lm import LanguageModel
from rice_eval.mllm.probe import PooledProjector, generator
from rice_eval.probes.linear import warmup_cosine
from rice_eval.views import Frame

__all__ = ["Region", "Words", "align", "coverage", "regions_of", "words_of"]

_BATCH = 32  # images a step
_DECAY = 0.05  # of AdamW, as customary for small heads on frozen features
_SEEN = 10  # regions that a word must be said of
_SCALE = 10.0  # of the cosines at the start, as SigLIP's (arXiv 2303.15343)
_BIAS = -3.0  # of a cell's logits at the start: one word in twenty


@dataclass(frozen=True)
class Region:
    """A box ``(x0, y0, x1, y1)`` in fractions of the view's sides, and what is said of it."""

    box: tuple[float, float, float, float]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """Words that regions are described by, and their embeddings ``(V, D_lm)`` (the mean over a word's pieces)."""

    names: tuple[str, ...]
    embeddings: Tensor


def regions_of(described: Sequence[Question], frame: Frame) -> list[Region]:
    """Described boxes of a training image, as a view's frame shows them; those outside it are left out."""
    out = []
    height, width = frame.size
    for question in described:
        if question.box is None:
            continue
        ((x0, y0, x1, y1),) = frame.boxes(np.array([question.box]), clip=True)
        if x1 > x0 and y1 > y0:
            box = (float(x0) / width, float(y0) / height, float(x1) / width, float(y1) / height)
            out.append(Region(box, tuple(dict.fromkeys(re.findall(r"[^\W\d_]{3,}", question.answer.lower())))))
    return out


def words_of(regions: Sequence[Sequence[Region]], lm: LanguageModel) -> Words:
    """The words said of at least ten regions, alphabetically, as the language model embeds them inside a sentence.

    Args:
        regions: of every training image.
        lm: whose table is read.

    Raises:
        DataError: no word is said often enough.
    """
    counts = Counter(word for image in regions for region in image for word in region.words)
    names = tuple(sorted(word for word, count in counts.items() if count >= _SEEN))
    if len(names) < 2:
        raise DataError(
            f"the training split has no two words that are said of {_SEEN} regions each",
            "choose a dataset with described regions, or --set align_epochs=0",
        )
    return Words(names, torch.stack([lm.words(_pieces(lm, name)).mean(0) for name in names]))


def _pieces(lm: LanguageModel, name: str) -> list[int]:
    """Tokens of a word inside a sentence, without a piece that is a space alone (sentencepiece's, before a word that stands first)."""
    ids: list[int] = lm.tokenizer(f" {name}", add_special_tokens=False).input_ids
    return [i for i in ids if lm.tokenizer.decode([i]).strip()] or ids


def coverage(box: tuple[float, float, float, float], side: int) -> Tensor:
    """``(side * side,)`` in raster order: which part of each cell a box covers, 0 to 1."""
    edges = torch.arange(side + 1) / side
    x0, y0, x1, y1 = box
    across = (edges[1:].clamp(max=x1) - edges[:-1].clamp(min=x0)).clamp_min(0) * side
    down = (edges[1:].clamp(max=y1) - edges[:-1].clamp(min=y0)).clamp_min(0) * side
    return (down[:, None] * across[None]).flatten()


def _targets(regions: Sequence[Region], places: dict[str, int], side: int) -> Tensor:
    """``(side * side, V)``: how much of a cell lies on something that a word is said of."""
    out = torch.zeros(side * side, len(places))
    for region in regions:
        share = coverage(region.box, side)
        for word in region.words:
            if word in places:
                out[:, places[word]] = torch.maximum(out[:, places[word]], share)
    return out


def align(
    projector: PooledProjector,
    tokens: Sequence[Tensor],
    regions: Sequence[Sequence[Region]],
    words: Words,
    *,
    epochs: int,
    lr: float,
    seed: int,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[float, ...]:
    """Teach the projector which words its embeddings should be near.

    Cell by cell and word by word, the cosine of the two embeddings (less the words' mean), scaled and shifted, is the logit of
    the word being said of what the cell lies on. AdamW, half a cosine.

    Args:
        projector: changed in place.
        tokens: ``(side*side, D)`` pooled tokens of each training image.
        regions: of each.
        words: see ``words_of``.
        epochs: passes over the images.
        lr: peak rate.
        seed: of the images' order.
        advance: called with the number of steps done.

    Returns:
        Mean loss of each epoch.
    """
    places = {name: n for n, name in enumerate(words.names)}
    device = projector.size.device
    middle = words.embeddings.mean(0).to(device)
    known = nn.functional.normalize(words.embeddings.to(device) - middle, dim=-1)
    wanted = [_targets(image, places, projector.side) for image in regions]
    bias = nn.Parameter(torch.full((len(places),), _BIAS, device=device))
    scale = nn.Parameter(torch.tensor(math.log(_SCALE), device=device))
    groups = [
        {"params": list(projector.layers.parameters()), "weight_decay": _DECAY},
        {"params": [bias, scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    total = epochs * steps_of(len(tokens), 1)
    grid = (projector.side, projector.side)
    projector.train()
    curve, step = [], 0
    for epoch in range(epochs):
        losses = []
        for picked in _batches(len(tokens), seed, epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr * warmup_cosine(step, total, 0)
            out = projector.words(torch.stack([tokens[k] for k in picked]).to(device).float(), grid) * projector.size
            near = nn.functional.normalize(out - middle, dim=-1) @ known.T
            truth = torch.stack([wanted[k] for k in picked]).to(device)
            loss = nn.functional.binary_cross_entropy_with_logits(near * scale.exp() + bias, truth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise DataError(f"the alignment's loss is {losses[-1]} at step {step + 1}", "lower --set align_lr")
            step += 1
            advance(1)
        curve.append(sum(losses) / len(losses))
    projector.eval()
    return tuple(curve)


def steps_of(images: int, epochs: int) -> int:
    """Steps of an alignment."""
    return epochs * math.ceil(images / _BATCH)


def _batches(images: int, seed: int, epoch: int) -> Iterator[list[int]]:
    order = torch.randperm(images, generator=generator(seed, 3, epoch)).tolist()
    for start in range(0, images, _BATCH):
        yield order[start : start + _BATCH]
