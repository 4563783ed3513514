"""Protocols ``region-linear`` and ``region-knn``: which class a given region is, learnt from pooled frozen tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters.base import EncoderFacts
from rice_eval.probes.knn import nearest, vote
from rice_eval.probes.linear import HeadGroup, Moments, warmup_cosine
from rice_eval.protocols.base import Context, Head, Outcome
from rice_eval.protocols.regions import RegionPass, RegionProtocol, RegionSet
from rice_eval.protocols.segmentation import LAYER_SETS, LayerSet, check_choice, held_out, layers_of

__all__ = ["RegionKnn", "RegionLinear"]


@dataclass(frozen=True)
class _Probe(RegionProtocol):
    """Choice on held-out training images, then once over the test split.

    Attributes:
        layer_set: ``last``, ``last4``, ``quarters`` or ``all``; the layer is chosen too.
        holdout: share of the training images held out for the choice.
    """

    layer_set: LayerSet = "last"
    holdout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        if not 0 < self.holdout < 1:
            raise ValueError("holdout is in (0, 1)")

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set``; the last alone for a region head."""
        return (facts.layers,) if self.how == "prompter" else layers_of(self.layer_set, facts)

    def grid(self) -> list[dict[str, Any]]:
        """Settings to choose from, without the layer."""
        raise NotImplementedError

    def predict(
        self,
        x: Tensor,
        labels: Tensor,
        queries: Tensor,
        classes: int,
        grid: Sequence[dict[str, Any]],
        device: torch.device,
    ) -> list[Tensor]:
        """Predicted classes ``(Q,)`` of queries for each setting, learnt from ``x (n, D)`` and ``labels (n,)``."""
        raise NotImplementedError

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        layers = self.layers(context.facts)
        train = self.collect(context, "train", layers)
        start = time.perf_counter()
        chosen, heads = {}, []
        for method, layer in train.found.parts:
            # Each method is chosen by itself; crops have one layer.
            for setting, score in self._scores(context, train.found, method, layer):
                heads.append((method, {"layer": layer, **setting}, score))
        for method in dict.fromkeys(m for m, _, _ in heads):
            mine = [(s, score) for m, s, score in heads if m == method]
            chosen[method] = max(mine, key=lambda pair: -1.0 if pair[1] is None else pair[1])[0]
        fitted = time.perf_counter()
        test = self.collect(context, "test", layers)
        predicted, took = self._test(context, train, test, chosen)
        first = chosen[self.how]
        outcome = {**first, **{f"crop_{k}": v for k, v in chosen.get("crop", {}).items() if k != "layer"}}
        statistics = test.found.statistics(context.test.things, predicted)
        return Outcome(
            statistics=statistics,
            chosen=outcome,
            layers=(first["layer"],),
            heads=tuple(Head({"features": m, **s}, score) for m, s, score in heads),
            seconds={"pool": train.seconds + test.seconds, "fit": fitted - start, "predict": took},
            warnings=(*train.found.warnings("training"), *test.found.warnings("test")),
            forwards=train.found.forwards + test.found.forwards,
        )

    def _scores(
        self, context: Context, found: RegionSet, method: str, layer: int
    ) -> list[tuple[dict[str, Any], float | None]]:
        """mAcc of every setting on held-out images; None where there is nothing to choose."""
        grid = self.grid()
        if len(grid) == 1 and sum(m == method for m, _ in found.parts) == 1:
            return [(grid[0], None)]
        _, held = held_out(range(len(found.ids)), self.holdout, self.seed)
        out = np.isin(found.image, held)
        x, labels = found.features(method, layer), torch.tensor(found.labels)
        rest = torch.from_numpy(~out)
        classes = context.train.things
        guesses = self.predict(x[rest], labels[rest], x[~rest], len(classes), grid, context.device)
        part = RegionSet(found.ids, image=np.array(found.image)[out].tolist(), labels=labels[~rest].tolist())
        marks = [part.statistics(classes, {"it": g.numpy()}).point()["macc"] for g in guesses]
        return [(setting, float(np.nan_to_num(mark))) for setting, mark in zip(grid, marks)]

    def _test(
        self, context: Context, train: RegionPass, test: RegionPass, chosen: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, NDArray[np.int64]], float]:
        start = time.perf_counter()
        predicted = {}
        labels = torch.tensor(train.found.labels)
        for method, setting in chosen.items():
            layer = setting["layer"]
            x, queries = train.found.features(method, layer), test.found.features(method, layer)
            guess = self.predict(x, labels, queries, len(context.train.things), [setting], context.device)[0]
            predicted[method] = guess.numpy()
        return predicted, time.perf_counter() - start


@dataclass(frozen=True)
class RegionLinear(_Probe):
    """A linear classifier of pooled features, standardised by the training regions.

    Attributes:
        lrs, wds: AdamW's rates and decays to choose from.
        betas: AdamW's.
        steps, batch: optimiser steps, regions a step.
        warmup: share of the steps with a rising rate; then half a cosine to 0.
        norm_eps: added to variances.
    """

    id: ClassVar[str] = "region-linear"

    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    wds: tuple[float, ...] = (1e-3, 1e-1)
    betas: tuple[float, ...] = (0.9, 0.999)
    steps: int = 500
    batch: int = 256
    warmup: float = 0.1
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lrs or not self.wds or len(self.betas) != 2:
            raise ValueError("lrs and wds need at least one value each, betas exactly two")
        if min(self.steps, self.batch) < 1 or not 0 <= self.warmup < 1:
            raise ValueError("steps and batch are at least 1, warmup is in [0, 1)")

    def grid(self) -> list[dict[str, Any]]:
        """Rates times decays."""
        return [{"lr": lr, "wd": wd} for lr in self.lrs for wd in self.wds]

    def predict(
        self,
        x: Tensor,
        labels: Tensor,
        queries: Tensor,
        classes: int,
        grid: Sequence[dict[str, Any]],
        device: torch.device,
    ) -> list[Tensor]:
        """All settings are trained side by side on the same batches."""
        moments = Moments(x.shape[1])
        moments.add(x)
        rates, decays = tuple(g["lr"] for g in grid), tuple(g["wd"] for g in grid)
        betas = (self.betas[0], self.betas[1])
        group = HeadGroup(moments, classes, rates, decays, betas, self.norm_eps, device)
        truth = F.one_hot(labels, classes).float()
        rng = np.random.default_rng(self.seed)
        order = np.zeros(0, np.int64)
        warmup = round(self.warmup * self.steps)
        for step in range(self.steps):
            while len(order) < self.batch:
                order = np.concatenate([order, rng.permutation(len(x))])
            pick, order = torch.from_numpy(order[: self.batch]), order[self.batch :]
            group.step(x[pick], truth[pick], warmup_cosine(step, self.steps, warmup))
        logits = group.logits(queries).cpu()
        return [logits[:, h].argmax(dim=1) for h in range(len(grid))]


@dataclass(frozen=True)
class RegionKnn(_Probe):
    """The most frequent class of a region's nearest training regions, by cosine; nothing is trained.

    Attributes:
        ks: numbers of neighbours to choose from.
    """

    id: ClassVar[str] = "region-knn"

    ks: tuple[int, ...] = (1, 3, 10, 30)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ks or min(self.ks) < 1:
            raise ValueError("ks need at least one value, each 1 or more")

    def grid(self) -> list[dict[str, Any]]:
        """The numbers of neighbours."""
        return [{"k": k} for k in self.ks]

    def predict(
        self,
        x: Tensor,
        labels: Tensor,
        queries: Tensor,
        classes: int,
        grid: Sequence[dict[str, Any]],
        device: torch.device,
    ) -> list[Tensor]:
        """One search serves every setting."""
        ks = [int(g["k"]) for g in grid]
        _, rows = nearest(lambda: [(0, queries)], lambda: [(0, x)], len(queries), max(ks), "cosine", device)
        votes = vote(labels[rows][..., None], ks, classes, -1)
        return [votes[k][:, 0] for k in ks]
