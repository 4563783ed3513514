"""Protocol ``linear``: linear heads on banked tokens by token cross-entropy, swept over layers, rates and decays in one go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import TokenReader
from rice_eval.datasets.base import Annotation
from rice_eval.errors import DataError
from rice_eval.metrics.iou import scores
from rice_eval.probes.linear import HeadGroup, LinearMap, Moments, warmup_cosine
from rice_eval.probes.targets import SparseTargets, TargetStore, token_areas
from rice_eval.protocols.base import Context, Head, Outcome
from rice_eval.protocols.labels import FewLabels, share_of
from rice_eval.protocols.segmentation import (
    LAYER_SETS,
    HeadTest,
    LayerSet,
    Scorer,
    TrainPass,
    check_choice,
    check_optimiser,
    check_trained,
    held_out,
    joined,
    layers_of,
)

__all__ = ["Fitted", "Linear", "LinearTrainPass"]


@dataclass(frozen=True)
class Fitted:
    """A trained head: what it is, the layer it reads, what was chosen, every head of the sweep, seconds by phase, notes."""

    head: LinearMap
    layer: int
    chosen: dict[str, float | int]
    heads: tuple[Head, ...]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Linear(FewLabels):
    """A linear probe on banked tokens.

    Every head standardises features by the training set's mean and variance (what a batch norm's running statistics converge
    to when features are frozen), then maps them linearly to logits. Heads of all layers, rates and decays train on the
    same batches by token cross-entropy; the one with the best mIoU on held-out training images, measured with
    nearest-neighbour upsampling, is trained again on all of them; the test split is read once, logits upsampled
    bilinearly to the original image.

    Attributes:
        layer_set: ``last``, ``last4``, ``quarters`` or ``all``; each layer gets heads of its own.
        lrs, wds: the sweep: AdamW's learning rates and weight decays.
        betas: AdamW's.
        steps: optimiser steps.
        batch: images a step.
        tokens_per_image: tokens drawn at random of each image and step; all where it has fewer.
        warmup: share of the steps with a rising rate; then half a cosine to 0.
        norm_eps: added to variances.
        holdout: share of the training images held out for the choice.
        labels: see ``FewLabels``.
        seed: of the split, the order of images and the tokens drawn.
    """

    id: ClassVar[str] = "linear"
    kind: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"semantic"})
    metric: ClassVar[str] = "miou"
    rereads: ClassVar[bool] = True

    layer_set: LayerSet = "last"
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    wds: tuple[float, ...] = (1e-3, 1e-1)
    betas: tuple[float, ...] = (0.9, 0.999)
    steps: int = 300
    batch: int = 16
    tokens_per_image: int = 128
    warmup: float = 0.1
    norm_eps: float = 1e-6
    holdout: float = 0.1

    def __post_init__(self) -> None:
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        share_of(self.labels)
        if not self.lrs or not self.wds or len(self.betas) != 2:
            raise ValueError("lrs and wds need at least one value each, betas exactly two")
        if min(self.steps, self.batch, self.tokens_per_image) < 1:
            raise ValueError("steps, batch and tokens_per_image are at least 1")
        if not 0 <= self.warmup < 1 or not 0 < self.holdout < 1:
            raise ValueError("warmup is in [0, 1) and holdout in (0, 1)")
        check_optimiser(self.lrs, self.wds, self.betas)
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError("norm_eps is 0 or more")

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set``."""
        return layers_of(self.layer_set, facts)

    def cells_a_side(self, stride: float) -> int:
        """n where a token of this stride is cut into n * n cells with logits of their own; 1 here."""
        return 1

    def fit(self, context: Context, classes: int, train_pass: type[LinearTrainPass] | None = None) -> Fitted:
        """Train the sweep, choose on the held-out part, train the choice on all of train.

        Args:
            context: see ``Context``; its test split is not read.
            classes: C.
            train_pass: what labels the training images; their semantic masks by default.
        """
        context, notes = self.labelled(context)
        layers = self.layers(context.facts)
        grid = tuple((layer, lr, wd) for layer in layers for lr in self.lrs for wd in self.wds)
        source = context.tokens("train", self.view)
        indices = source.indices
        held: tuple[int, ...] = ()
        fit = tuple(indices)
        if len(grid) > 1:
            fit, held = held_out(indices, self.holdout, self.seed)
        sides = {layer: self.cells_a_side(context.facts.strides[layer - 1]) for layer in layers}
        advance = context.progress("labels", len(indices))
        train = (train_pass or LinearTrainPass)(layers, context.facts, held, advance, sides)
        source.consume(train)
        if not train.labelled:
            raise DataError(f"dataset '{context.train.name}': no training image has a labelled pixel")
        start = time.perf_counter()
        reader = source.reader()
        fitter = _Fitter(self, train.stores, reader, classes, context.device, sides)
        heads: tuple[Head, ...] = ()
        best = 0
        if len(grid) > 1:
            moments = train.fit_moments
            groups = {layer: fitter.group(layer, moments[layer], self._pairs()) for layer in layers}
            fitter.train(groups, fit, context.progress("sweep", self.steps))
            found = fitter.score(groups, held)
            marks = [float(m) for layer in layers for m in found[layer]]
            heads = tuple(Head(_named(*g), m) for g, m in zip(grid, marks))
            best = int(np.argmax(np.nan_to_num(np.array(marks), nan=-1.0)))
        layer, lr, wd = grid[best]
        moment = train.fit_moments[layer] + train.held_moments[layer] if held else train.fit_moments[layer]
        group = fitter.group(layer, moment, ((lr, wd),))
        fitter.train({layer: group}, indices, context.progress("refit", self.steps))
        head = group.export(0)
        check_trained(self.id, head.weight, head.bias)
        return Fitted(
            head=head,
            layer=layer,
            chosen=_named(layer, lr, wd),
            heads=heads or (Head(_named(layer, lr, wd), None),),
            seconds={"targets": train.seconds, "fit": time.perf_counter() - start},
            notes=notes,
        )

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        fitted = self.fit(context, len(context.train.classes))
        test = context.tokens("test", self.view)
        scorer = Scorer(context.test, test.indices, context.panels, context.keep_predictions)
        consumer = HeadTest(fitted.head, fitted.layer, scorer, context.progress("predict", len(test.indices)))
        test.consume(consumer)
        return Outcome(
            statistics=scorer.statistics(),
            chosen=fitted.chosen,
            layers=(fitted.layer,),
            heads=fitted.heads,
            seconds={**fitted.seconds, "predict": consumer.seconds},
            panels=tuple(scorer.panels),
            warnings=(*fitted.notes, *scorer.warnings()),
            predictions=scorer.predictions,
        )

    def _pairs(self) -> tuple[tuple[float, float], ...]:
        return tuple((lr, wd) for lr in self.lrs for wd in self.wds)


def _named(layer: int, lr: float, wd: float) -> dict[str, float | int]:
    return {"layer": layer, "lr": lr, "wd": wd}


class LinearTrainPass(TrainPass):
    """Feature moments of both parts of the split."""

    def __init__(
        self,
        layers: Sequence[int],
        facts: EncoderFacts,
        held: Sequence[int],
        advance: Callable[[int], None],
        sides: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(layers, facts, advance, sides)
        self.fit_moments = {layer: Moments(facts.widths[layer - 1]) for layer in layers}
        self.held_moments = {layer: Moments(facts.widths[layer - 1]) for layer in layers}
        self._held = frozenset(held)

    def take(self, index: int, layer: int, patches: Tensor, targets: SparseTargets) -> None:
        """See ``TrainPass.take``."""
        (self.held_moments if index in self._held else self.fit_moments)[layer].add(patches)


@dataclass(frozen=True)
class _Fitter:
    """Trains groups of heads, one a layer, on the same images."""

    protocol: Linear
    stores: Mapping[int, TargetStore]
    reader: TokenReader
    classes: int
    device: torch.device
    sides: Mapping[int, int]

    def group(self, layer: int, moments: Moments, pairs: Sequence[tuple[float, float]]) -> HeadGroup:
        """A group of heads of a layer, one a pair of rate and decay."""
        one, two = self.protocol.betas
        rates, decays = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        cells = self.sides[layer] ** 2
        return HeadGroup(moments, self.classes, rates, decays, (one, two), self.protocol.norm_eps, self.device, cells)

    def _order(self, indices: Sequence[int]) -> Iterator[int]:
        epoch = 0
        while True:
            shuffle = np.random.default_rng((self.protocol.seed, epoch)).permutation(len(indices))
            yield from (indices[k] for k in shuffle)
            epoch += 1

    def train(self, groups: Mapping[int, HeadGroup], indices: Sequence[int], advance: Callable[[int], None]) -> None:
        """Train every group for ``steps`` steps on ``indices``."""
        p = self.protocol
        order = self._order(indices)
        warmup = round(p.warmup * p.steps)
        for step in range(p.steps):
            factor = warmup_cosine(step, p.steps, warmup)
            rng = np.random.default_rng((p.seed, step, 1))
            for layer, (tokens, counts) in self._batch(
                [next(order) for _ in range(p.batch)], tuple(groups), rng
            ).items():
                groups[layer].step(tokens, counts, factor)
            advance(1)

    def _batch(
        self, images: Sequence[int], layers: Sequence[int], rng: np.random.Generator
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """layer -> ``(T, D)`` tokens, ``(T * K, C)`` histograms of their cells; layers that share targets get the same tokens."""
        parts: dict[int, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in layers}
        for index in images:
            tokens, targets = self._image(index, layers)
            drawn: dict[int, tuple[Tensor, Tensor]] = {}
            for layer in layers:
                store = id(self.stores[layer])
                if store not in drawn:
                    dense = targets[store].view(len(tokens[layer]), -1, self.classes)
                    count = min(self.protocol.tokens_per_image, len(dense))
                    pick = torch.from_numpy(np.sort(rng.choice(len(dense), count, replace=False)))
                    drawn[store] = pick, dense[pick].flatten(0, 1)
                pick, counts = drawn[store]
                parts[layer][0].append(tokens[layer][pick])
                parts[layer][1].append(counts)
        return {layer: (torch.cat(tokens), torch.cat(counts)) for layer, (tokens, counts) in parts.items()}

    def _image(self, index: int, layers: Sequence[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """layer -> ``(N, D)`` tokens, and store -> ``(N * K, C)`` histograms, of one image."""
        image = self.reader[index]
        tokens = {layer: joined(image.patches[layer]) for layer in layers}
        stores = {id(self.stores[layer]): self.stores[layer] for layer in layers}
        return tokens, {key: store[index].dense(self.classes) for key, store in stores.items()}

    def score(self, groups: Mapping[int, HeadGroup], held: Sequence[int]) -> dict[int, Tensor]:
        """layer -> ``(H,)`` mIoU on the held-out images with nearest-neighbour upsampling, in percent."""
        areas = {layer: torch.zeros(g.heads, 3, self.classes, dtype=torch.float64) for layer, g in groups.items()}
        for index in held:
            image = self.reader[index]
            for layer, group in groups.items():
                counts = self.stores[layer][index].dense(self.classes).to(self.device)
                predicted = group.logits(joined(image.patches[layer])).argmax(dim=-1)
                areas[layer] += token_areas(predicted, counts).cpu()
        return {layer: torch.from_numpy(scores(a.numpy())["miou"]) for layer, a in areas.items()}
