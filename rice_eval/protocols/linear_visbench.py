"""Protocol ``visbench-linear``: VisBench's semantic segmentation probe, on banked tokens.

It trains on one fixed view without augmentation, so the bank gives exactly the features its own loop sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import ImageTokens
from rice_eval.datasets.base import IGNORE, Annotation
from rice_eval.errors import DataError, PlanError
from rice_eval.probes.linear import AdamW
from rice_eval.probes.targets import TargetStore, token_histograms
from rice_eval.protocols.base import Context, Head, Outcome, Protocol
from rice_eval.protocols.online_head import PixelHead, pixel_loss
from rice_eval.protocols.schedules import schedule
from rice_eval.protocols.segmentation import (
    LAYER_SETS,
    FrameLabels,
    LayerSet,
    Scorer,
    check_choice,
    check_optimiser,
    check_trained,
    checked_labels,
    label_map,
    layers_of,
)
from rice_eval.protocols.segmentation_rows import MaskStore

__all__ = ["VisbenchLinear"]


@dataclass(frozen=True)
class VisbenchLinear(Protocol):
    """VisBench's linear probe (turhancan97/VisBench 0.27, ``tasks/dense_base.py`` and ``tasks/high_level``).

    A 1x1 convolution without norm on the last block, cross-entropy over labelled pixels of the view's size, bilinear logits.
    Scored at the view's size, as there; its second, per-image mIoU is not reported. Layers of a set are concatenated.

    Attributes:
        layer_set: ``last`` in VisBench.
        lr, wd, betas: AdamW's.
        epochs, batch, warmup_epochs: ten passes; the rate rises for the first one and a half, then falls along half a cosine. The
            last batch of a pass may be smaller.
        loss: ``pixel`` as published, or ``token``: the same with nearest-neighbour upsampling, many times cheaper.
        seed: of the head's start and of the order.
    """

    id: ClassVar[str] = "visbench-linear"
    kind: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"semantic"})
    metric: ClassVar[str] = "miou"
    rereads: ClassVar[bool] = True

    view: str = "square=224"
    layer_set: LayerSet = "last"
    lr: float = 5e-4
    wd: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    epochs: int = 10
    batch: int = 8
    warmup_epochs: float = 1.5
    loss: Literal["pixel", "token"] = "pixel"

    def __post_init__(self) -> None:
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        check_choice("loss", self.loss, ("pixel", "token"))
        if min(self.epochs, self.batch) < 1 or len(self.betas) != 2 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                "epochs and batch are at least 1, betas two, and warmup_epochs is shorter than the training"
            )
        check_optimiser((self.lr,), (self.wd,), self.betas)

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set``."""
        return layers_of(self.layer_set, facts)

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``. The settings are the recipe's: nothing is held out and nothing chosen."""
        layers = self.layers(context.facts)
        source = context.tokens("train", self.view)
        indices = source.indices
        if not indices:
            raise DataError(f"dataset '{context.train.name}' has no training image", "check --data")
        pixels = self.loss == "pixel"
        masks = _Labels(None if pixels else layers[0], context.progress("labels", len(indices)))
        source.consume(masks)
        reader = source.reader()
        start = time.perf_counter()
        classes = len(context.train.classes)
        width = sum(context.facts.widths[layer - 1] for layer in layers)
        head = PixelHead(width, classes, False, 0.0, "uniform", self.seed).to(context.device)
        steps = _Steps(head, self.wd, (self.betas[0], self.betas[1]))
        each = -(-len(indices) // self.batch)
        factor = schedule("cosine", each * self.epochs, int(self.warmup_epochs * each), 0.0, 1.0)
        advance = context.progress("steps", each * self.epochs)
        for step, batch in enumerate(self._batches(indices)):
            images = [reader[index] for index in batch]
            if pixels:
                features = torch.stack([feature_map(tokens, layers) for tokens in images])
                labels = torch.stack([masks.pixels[index] for index in batch])
                head.zero_grad()
                pixel_loss(head(features.to(context.device)), labels.to(context.device), False)
                steps.step(_gradient(head.conv.weight).flatten(1), _gradient(head.conv.bias), self.lr * factor(step))
            else:
                rows = torch.cat([token_rows(tokens, layers) for tokens in images])
                counts = torch.cat([masks.tokens[index].dense(classes) for index in batch])
                weight, bias = _token_gradient(head, rows.to(context.device), counts.to(context.device))
                steps.step(weight, bias, self.lr * factor(step))
            advance(1)
        head.eval()
        check_trained(self.id, *head.parameters())
        fitted = time.perf_counter()
        test = context.tokens("test", self.view)
        test_reader = test.reader()
        begun = time.perf_counter()
        scorer = Scorer(context.test, test.indices, context.panels, context.keep_predictions)
        advance = context.progress("predict", len(test.indices))
        for index in test.indices:
            tokens = test_reader[index]
            h, w = tokens.grids[layers[0]][0]
            with torch.no_grad():
                logits = _row_logits(head, token_rows(tokens, layers).to(context.device)).T.reshape(classes, h, w)
            prediction = label_map(logits, tokens.frames[0].size).cpu().numpy()
            truth = tokens.frames[0].mask(checked_labels(context.test, index), IGNORE).astype(np.int16)
            scorer.add(index, truth, prediction)
            advance(1)
        settings = {"layers": list(layers), "lr": self.lr, "wd": self.wd}
        return Outcome(
            statistics=scorer.statistics(),
            chosen=settings,
            layers=layers,
            heads=(Head(settings, None),),
            seconds={"fit": fitted - start, "predict": time.perf_counter() - begun},
            panels=tuple(scorer.panels),
            warnings=scorer.warnings(),
            predictions=scorer.predictions,
        )

    def _batches(self, indices: tuple[int, ...]) -> Iterator[list[int]]:
        for epoch in range(self.epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(indices))
            for start in range(0, len(order), self.batch):
                yield [indices[k] for k in order[start : start + self.batch]]


class _Steps:
    """AdamW on the head's kernel and bias, both decayed, as ``torch.optim.AdamW`` on its parameters.

    torch's own imports its compiler on the way, which takes longer than this probe's whole training on a warm bank.
    """

    def __init__(self, head: PixelHead, decay: float, betas: tuple[float, float]) -> None:
        device = head.conv.weight.device
        self._parameters = (head.conv.weight.data.flatten(1), cast("Tensor", head.conv.bias).data[None])
        wd = torch.tensor(decay, device=device)
        self._adam = [AdamW((p.shape[0], p.shape[1]), wd, betas, 1e-8, device) for p in self._parameters]

    def step(self, weight: Tensor, bias: Tensor, rate: float) -> None:
        """One step with the gradients ``(C, D)`` and ``(C,)``."""
        for adam, parameter, gradient in zip(self._adam, self._parameters, (weight, bias[None])):
            adam.step(parameter, gradient, torch.tensor(rate, device=parameter.device))


def _gradient(parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    assert parameter.grad is not None
    return parameter.grad


def _token_gradient(head: PixelHead, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(C, D)`` and ``(C,)`` of ``token_loss``, written out: (softmax * n - counts) / sum(n)."""
    with torch.no_grad():
        residual = torch.softmax(_row_logits(head, rows), dim=-1)
        residual.mul_(counts.sum(dim=1, keepdim=True)).sub_(counts).div_(counts.sum().clamp(min=1.0))
        return residual.T @ rows, residual.sum(dim=0)


class _Labels(FrameLabels):
    """Rides on the training pass: the view's label maps, or the histograms of a layer's tokens."""

    def __init__(self, layer: int | None, advance: Callable[[int], None]) -> None:
        self.pixels = MaskStore()
        self.tokens = TargetStore()
        self._layer, self._advance = layer, advance

    def consume(self, tokens: ImageTokens) -> None:
        """Take in one image."""
        if len(tokens.frames) != 1:
            raise PlanError(
                "this protocol reads one window an image, not a sliding view", "use a view such as square=224"
            )
        if self._layer is None:
            self.pixels.add(tokens.index, tokens.target[0])
        else:
            self.tokens.add(tokens.index, token_histograms(tokens.target[0], tokens.grids[self._layer][0], IGNORE))
        self._advance(1)


def _row_logits(head: PixelHead, rows: Tensor) -> Tensor:
    """``(T, D)`` tokens -> ``(T, C)`` logits: the head's convolution without turning tokens into a map and back."""
    return F.linear(rows, head.conv.weight.flatten(1), head.conv.bias)


def token_rows(tokens: ImageTokens, layers: tuple[int, ...]) -> Tensor:
    """``feature_map`` as ``(h * w, D)``, a token a row: as they lie in the bank, where the layers share a grid."""
    if len({tokens.grids[layer][0] for layer in layers}) > 1:
        return feature_map(tokens, layers).flatten(1).T
    rows = [tokens.patches[layer][0].float() for layer in layers]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def feature_map(tokens: ImageTokens, layers: tuple[int, ...]) -> Tensor:
    """``(D, h, w)`` float32 features of one window, layers concatenated at the grid of the first."""
    maps = []
    for layer in layers:
        h, w = tokens.grids[layer][0]
        maps.append(tokens.patches[layer][0].float().T.reshape(1, -1, h, w))
    size = maps[0].shape[-2:]
    return torch.cat(
        [F.interpolate(m, size=size, mode="bilinear") if m.shape[-2:] != size else m for m in maps], dim=1
    )[0]
