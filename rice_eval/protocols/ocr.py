"""Protocol ``ctc-linear``: lines of text at one height, frozen tokens pooled over it, one linear map, CTC."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import ImageTokens, TokenReader
from rice_eval.datasets.base import Annotation, Dataset
from rice_eval.datasets.text_crops import Scale, TextCrops
from rice_eval.probes.ctc import CtcGroup, best_path, needed_steps
from rice_eval.probes.linear import Moments, warmup_cosine
from rice_eval.protocols.base import Context, Head, Outcome, Protocol
from rice_eval.protocols.ocr_lines import (
    LineReader,
    LineScorer,
    check_lines,
    columns,
    crops_of,
    line_features,
    need_lines,
    remarks,
    unspellable,
)
from rice_eval.protocols.ocr_training import ReadsLines, Rider, TrainingLines
from rice_eval.protocols.segmentation import LAYER_SETS, LayerSet, check_choice, check_optimiser, layers_of

__all__ = ["CtcLinear", "FittedReader"]

_CACHE_BYTES = 512 << 20  # pooled features kept in memory while heads train; the rest is read from the bank again


@dataclass(frozen=True)
class FittedReader:
    """A reader, every head of the sweep, what was chosen, seconds by phase, and what a reader of the record must know."""

    reader: LineReader
    heads: tuple[Head, ...]
    chosen: dict[str, Any]
    seconds: dict[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class CtcLinear(Protocol):
    """Reading lines with one linear map.

    Every legible line becomes a crop of one height (``TextCrops``); its tokens are pooled over the height, standardised by the
    training set's mean and variance, and mapped linearly to CTC's logits, several steps a token where tokens are wide. Heads
    of all layers, rates and decays train on the same batches; the one with the best 1-NED on the lines of held-out training
    images is trained again on all; the test split is read once. The bank holds the crops' tokens, so that charsets,
    decoders and sweeps cost no further pass.

    Attributes:
        height: of the crops in pixels.
        scale, margin, max_aspect: see ``TextCrops``.
        charset: ``digits``, ``alnum`` (small letters), ``alnum-case``, ``ascii``, or ``train`` (what training lines hold).
            Characters outside are taken out of the training targets, and counted in a warning; test lines keep them.
        pool: ``mean``, ``max`` or ``stack``.
        frame: pixels of a crop a CTC step: a token of stride s emits ceil(s / frame) steps.
        layer_set: ``last``, ``last4``, ``quarters`` or ``all``; each layer gets heads of its own.
        lrs, wds, betas: the sweep: AdamW's learning rates and weight decays.
        steps, batch: optimiser steps, lines a step.
        warmup: share of the steps with a rising rate; then half a cosine to 0.
        norm_eps: added to variances.
        beam: width of the beam search without a lexicon; 0 decodes greedily.
        holdout: share of the training images held out for the choice.
    """

    id: ClassVar[str] = "ctc-linear"
    kind: ClassVar[str] = "ocr"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"text"})
    metric: ClassVar[str] = "one_minus_ned"
    rereads: ClassVar[bool] = True

    view: str = "native,pad=patch"
    height: int = 56
    scale: str = "fit"
    margin: float = 0.15
    max_aspect: float = 32.0
    charset: str = "ascii"
    pool: str = "mean"
    frame: float = 14.0
    layer_set: LayerSet = "quarters"
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    wds: tuple[float, ...] = (1e-1,)
    betas: tuple[float, ...] = (0.9, 0.999)
    steps: int = 800
    batch: int = 32
    warmup: float = 0.1
    norm_eps: float = 1e-6
    beam: int = 0
    holdout: float = 0.1

    def __post_init__(self) -> None:
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        check_lines(self.charset, self.pool, self.scale, self.height, self.margin, self.max_aspect)
        if not self.lrs or not self.wds or len(self.betas) != 2:
            raise ValueError("lrs and wds need at least one value each, betas exactly two")
        check_optimiser(self.lrs, self.wds, self.betas)
        if min(self.steps, self.batch) < 1 or self.beam < 0 or not 0 < self.frame < math.inf:
            raise ValueError("steps and batch are at least 1, beam 0 or more, frame above 0")
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError("norm_eps is 0 or more")
        if not 0 <= self.warmup < 1 or not 0 < self.holdout < 1:
            raise ValueError("warmup is in [0, 1) and holdout in (0, 1)")

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set``."""
        return layers_of(self.layer_set, facts)

    def views(self) -> Mapping[str, Sequence[str]]:
        """Crops of both splits; the images themselves go through no encoder."""
        return {"train/crops": (self.view,), "test/crops": (self.view,)}

    def part(self, name: str, dataset: Dataset) -> TextCrops:
        """``crops``: every legible line of a split."""
        if name != "crops":
            raise KeyError(f"protocol '{self.id}' derives nothing named '{name}'")
        return crops_of(dataset, self.height, self.scale, self.margin, self.max_aspect)

    @property
    def part_scale(self) -> Scale:
        """``scale`` as ``TextCrops`` takes it."""
        return "native" if self.scale == "native" else "fit"

    def token_steps(self, facts: EncoderFacts, layer: int) -> int:
        """K: CTC steps a token of this layer emits."""
        return max(1, int(np.ceil(facts.strides[layer - 1] / self.frame - 1e-9)))

    def fit(self, context: Context) -> FittedReader:
        """Train the sweep on crops of the training split, choose, and train the choice on all of them."""
        layers = self.layers(context.facts)
        crops = self.part("crops", context.train)
        source = context.tokens("train/crops", self.view)
        indices = source.indices
        grid = tuple((layer, lr, wd) for layer in layers for lr in self.lrs for wd in self.wds)
        lines = TrainingLines.of(crops, indices, self.charset, len(grid) > 1, self.holdout, self.seed)
        seen = _Sums(crops, layers, frozenset(lines.held), self.pool, context.progress("lines", len(indices)))
        source.consume(seen)
        start = time.perf_counter()
        fitter = _Fitter(self, _Features(source.reader(), crops, self.pool, layers), lines, context)
        heads: tuple[Head, ...] = ()
        best = 0
        if len(grid) > 1:
            groups = {layer: fitter.group(layer, seen.fit[layer], self._pairs()) for layer in layers}
            fitter.train(groups, lines.fit, context.progress("sweep", self.steps))
            marks = [m for layer in layers for m in fitter.score(layer, groups[layer])]
            heads = tuple(Head(_named(*g), m) for g, m in zip(grid, marks))
            best = int(np.argmax(marks))
        layer, lr, wd = grid[best]
        moments = seen.fit[layer] + seen.held[layer] if lines.held else seen.fit[layer]
        group = fitter.group(layer, moments, ((lr, wd),))
        fitter.train({layer: group}, indices, context.progress("refit", self.steps))
        k = self.token_steps(context.facts, layer)
        short = sum(needed_steps(lines.targets[i]) > k * seen.columns[layer][i] for i in indices)
        notes = lines.notes()
        if short:
            notes += (f"train: {short} of {len(indices)} lines have more characters than CTC steps and teach nothing",)
        return FittedReader(
            LineReader(group.export(0), layer, k, lines.charset, self.pool, self.beam),
            heads or (Head(_named(layer, lr, wd), None),),
            _named(layer, lr, wd),
            {"targets": seen.seconds, "fit": time.perf_counter() - start},
            notes,
        )

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        crops = self.part("crops", context.test)
        need_lines(crops, "test")
        fitted = self.fit(context)
        reader = fitted.reader
        test = context.tokens("test/crops", self.view)
        scorer = LineScorer(crops, context.panels, context.keep_predictions)

        def read(tokens: ImageTokens) -> str:
            grid = tokens.grids[reader.layer][0]
            count = columns(grid, tokens.frames[0], crops.content_width(tokens.index))
            return reader.read(tokens.patches[reader.layer][0], grid, count)

        reading = ReadsLines(read, scorer, context.progress("read", len(test.indices)))
        test.consume(reading)
        statistics, panels, kept = scorer.finish()
        return Outcome(
            statistics=statistics,
            chosen=fitted.chosen,
            layers=(reader.layer,),
            heads=fitted.heads,
            seconds={**fitted.seconds, "predict": reading.seconds},
            panels=panels,
            warnings=(*fitted.warnings, *remarks(crops, "test"), *unspellable(crops, reader.charset)),
            predictions=kept,
        )

    def _pairs(self) -> tuple[tuple[float, float], ...]:
        return tuple((lr, wd) for lr in self.lrs for wd in self.wds)


def _named(layer: int, lr: float, wd: float) -> dict[str, float | int]:
    return {"layer": layer, "lr": lr, "wd": wd}


class _Sums(Rider):
    """Rides on the training pass: moments of the lines' features, of both parts of the split."""

    def __init__(
        self,
        crops: TextCrops,
        layers: Sequence[int],
        held: frozenset[int],
        pool: str,
        advance: Callable[[int], None],
    ) -> None:
        super().__init__(advance)
        self._crops, self._away, self._pool = crops, held, pool
        self._layers = tuple(layers)
        self._moments: tuple[dict[int, Moments], dict[int, Moments]] = ({}, {})
        self._widths: dict[int, int] = {}
        self.columns: dict[int, dict[int, int]] = {layer: {} for layer in layers}

    def take(self, tokens: ImageTokens) -> None:
        """Take in one crop."""
        for layer in self._layers:
            count = columns(tokens.grids[layer][0], tokens.frames[0], self._crops.content_width(tokens.index))
            x = line_features(tokens.patches[layer][0], tokens.grids[layer][0], count, self._pool)
            self.columns[layer][tokens.index] = count
            self._widths[layer] = x.shape[1]
            self._moments[tokens.index in self._away].setdefault(layer, Moments(x.shape[1])).add(x)

    @property
    def fit(self) -> dict[int, Moments]:
        """layer -> moments of the lines that heads are fitted on."""
        return {layer: self._moments[0].get(layer, Moments(width)) for layer, width in self._widths.items()}

    @property
    def held(self) -> dict[int, Moments]:
        """layer -> moments of the lines held out."""
        return {layer: self._moments[1].get(layer, Moments(width)) for layer, width in self._widths.items()}


class _Features:
    """Features of lines by index, the latest of them kept in memory."""

    def __init__(self, reader: TokenReader, crops: TextCrops, pool: str, layers: Sequence[int]) -> None:
        self._reader, self._crops, self._pool, self._layers = reader, crops, pool, tuple(layers)
        self._kept: OrderedDict[int, dict[int, Tensor]] = OrderedDict()
        self._held = 0

    def __getitem__(self, index: int) -> dict[int, Tensor]:
        """layer -> ``(T, D)``."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        image = self._reader[index]
        found = {}
        for layer in self._layers:
            count = columns(image.grids[layer][0], image.frames[0], self._crops.content_width(index))
            found[layer] = line_features(image.patches[layer][0], image.grids[layer][0], count, self._pool)
        self._kept[index] = found
        self._held += sum(t.nbytes for t in found.values())
        while self._held > _CACHE_BYTES:
            _, old = self._kept.popitem(last=False)
            self._held -= sum(t.nbytes for t in old.values())
        return found


@dataclass(frozen=True)
class _Fitter:
    """Trains groups of heads, one a layer, on the same lines."""

    protocol: CtcLinear
    features: _Features
    lines: TrainingLines
    context: Context

    def group(self, layer: int, moments: Moments, pairs: Sequence[tuple[float, float]]) -> CtcGroup:
        """A group of heads, one a pair of rate and decay."""
        p = self.protocol
        return CtcGroup(
            moments,
            self.lines.charset.classes,
            p.token_steps(self.context.facts, layer),
            tuple(lr for lr, _ in pairs),
            tuple(wd for _, wd in pairs),
            (p.betas[0], p.betas[1]),
            p.norm_eps,
            self.context.device,
        )

    def _order(self, indices: Sequence[int]) -> Iterator[int]:
        epoch = 0
        while True:
            shuffle = np.random.default_rng((self.protocol.seed, epoch)).permutation(len(indices))
            yield from (indices[k] for k in shuffle)
            epoch += 1

    def train(self, groups: Mapping[int, CtcGroup], indices: Sequence[int], advance: Callable[[int], None]) -> None:
        """Train every group for ``steps`` steps on ``indices``."""
        p = self.protocol
        order = self._order(indices)
        warmup = round(p.warmup * p.steps)
        for step in range(p.steps):
            batch = [next(order) for _ in range(min(p.batch, len(indices)))]
            found = [self.features[i] for i in batch]
            for layer, group in groups.items():
                group.step(
                    [f[layer] for f in found],
                    [self.lines.targets[i] for i in batch],
                    warmup_cosine(step, p.steps, warmup),
                )
            advance(1)

    def score(self, layer: int, group: CtcGroup) -> list[float]:
        """Mean 1-NED of every head on the held-out lines, decoded greedily, in percent."""
        readings: list[list[str]] = [[] for _ in range(group.heads)]
        for index in self.lines.held:
            logits = group.logits(self.features[index][layer])
            for head, mine in enumerate(readings):
                mine.append(self.lines.charset.decode(best_path(logits[head])))
        return [self.lines.mark(mine) for mine in readings]
