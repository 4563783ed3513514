"""Protocols ``fcos-linear`` and ``fcos-sfp``: FCOS on frozen tokens of the bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import ImageTokens, TokenReader
from rice_eval.metrics.coco import Found
from rice_eval.probes.fcos import Level, Targets, assign, decode, fcos_loss, suppress
from rice_eval.probes.fcos_heads import LinearFcos, PyramidFcos, pyramid_levels
from rice_eval.probes.linear import Moments, warmup_cosine
from rice_eval.probes.pyramid import check_scales
from rice_eval.protocols.base import Context, Head, Outcome
from rice_eval.protocols.detection import (
    BoxScorer,
    DetectionProtocol,
    DetectionTest,
    Predict,
    Sample,
    TrainBoxes,
    TrainSet,
    image_truth,
    pyramid_layer,
    to_image,
)
from rice_eval.protocols.detection_train import LossLog, by_grid, decayed, maps_of, moments_of
from rice_eval.protocols.segmentation import LAYER_SETS, LayerSet, check_choice, held_out, layers_of
from rice_eval.views import Frame

__all__ = ["FcosLinear", "FcosSfp", "Map"]

Map = Callable[[Tensor, tuple[int, int]], Tensor]
"""``(N, D)`` tokens of one frame and their grid to ``(L, C + 5)`` outputs."""


@dataclass(frozen=True)
class _Fcos(DetectionProtocol):
    """What both share.

    Attributes:
        radius: centre sampling in cells (FCOS's improved version takes 1.5); 0 for the whole box.
        alpha, gamma: of the focal loss, as RetinaNet's and FCOS's.
    """

    radius: float = 1.5
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius < 0 or not 0 < self.alpha < 1 or self.gamma < 0:
            raise ValueError("radius and gamma are not negative, alpha is in (0, 1)")

    def levels_of(self, grid: tuple[int, int], size: tuple[int, int]) -> list[Level]:
        """The maps of a frame of ``size`` pixels whose tokens have this grid."""
        raise NotImplementedError

    def targets_of(self, samples: Sequence[Sample], layer: int, device: torch.device) -> Targets:
        """Targets of all locations of all samples, one after the other."""
        parts = []
        for s in samples:
            boxes, labels = torch.from_numpy(s.targets.boxes), torch.from_numpy(s.targets.labels)
            levels = self.levels_of(s.grids[layer], s.frame.size)
            parts.append(assign(levels, boxes, labels, torch.from_numpy(s.targets.ignored), self.radius))
        return Targets(
            torch.cat([p.label for p in parts]).to(device),
            torch.cat([p.distance for p in parts]).to(device),
            torch.cat([p.centreness for p in parts]).to(device),
        )

    def missed(self, train: TrainSet, layer: int, indices: Sequence[int]) -> tuple[str, ...]:
        """How many training boxes no location takes, in one line; of at most 500 images."""
        lost = total = 0
        for index in indices[:: max(1, len(indices) // 500)]:
            tokens = train.readers[0][index]
            for frame, grid, target in zip(tokens.frames, tokens.grids[layer], train.targets[0][index]):
                boxes, labels = torch.from_numpy(target.boxes), torch.from_numpy(target.labels)
                none = torch.zeros(0, 4)
                lost += assign(self.levels_of(grid, frame.size), boxes, labels, none, self.radius).missed
                total += len(labels)
        if not lost:
            return ()
        return (f"{lost} of {total} training boxes are taken by no location (too small, or hidden by smaller ones)",)

    def predictor(self, head: Map, layer: int, most: int) -> Predict:
        """Tokens of an image to at most ``most`` detections."""

        def predict(tokens: ImageTokens) -> Found:
            parts = []
            for patches, grid, frame in zip(tokens.patches[layer], tokens.grids[layer], tokens.frames):
                parts.append((head(patches, grid), self.levels_of(grid, frame.size), frame))
            return self._found(parts, most)

        return predict

    @torch.inference_mode()
    def _found(self, parts: Sequence[tuple[Tensor, Sequence[Level], Frame]], most: int) -> Found:
        boxes, scores, labels = [], [], []
        for outputs, levels, frame in parts:
            b, s, c = decode(outputs, levels, self.score_threshold, self.candidates)
            boxes.append(torch.from_numpy(to_image(b, frame)))
            scores.append(s.cpu())
            labels.append(c.cpu())
        box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        some = (box[:, 2:] > box[:, :2]).all(dim=1)
        box, score, label = suppress(box[some], score[some], label[some], self.nms_iou, most)
        return Found(box.double().numpy(), score.double().numpy(), label.numpy())

    def score(self, context: Context, reader: TokenReader, held: Sequence[int], head: Map, layer: int) -> float:
        """AP on held-out training images, in percent; 0 where they have no box."""
        scorer = BoxScorer(context.train, held)
        predict = self.predictor(head, layer, scorer.most)
        for index in held:
            scorer.add(index, image_truth(context.train, index), predict(reader[index]))
        return float(np.nan_to_num(scorer.statistics().point()["ap"]))

    def test(self, context: Context, head: Map, layer: int) -> tuple[BoxScorer, float]:
        """Read the test split once; detections, and seconds spent on them."""
        source = context.tokens("test", self.view)
        scorer = BoxScorer(context.test, source.indices, context.panels, context.keep_predictions)
        predict = self.predictor(head, layer, scorer.most)
        consumer = DetectionTest(predict, scorer, context.progress("detect", len(source.indices)))
        source.consume(consumer)
        return scorer, consumer.seconds


@dataclass(frozen=True)
class FcosLinear(_Fcos):
    """A dense linear probe: classes, box distances and centre-ness from each token alone.

    Every head standardises features by the training set's mean and variance, then maps them linearly to C + 5 outputs a
    token. Heads of all layers, rates and decays train on the same batches; the one with the best AP on held-out training
    images is trained again on all of them.

    Attributes:
        layer_set: ``last``, ``last4``, ``quarters`` or ``all``; each layer gets heads of its own.
        min_stride: pixels; layers of a CNN that are finer are left out: they cost most and know least.
        lrs, wds: the sweep: AdamW's learning rates and weight decays.
    """

    id: ClassVar[str] = "fcos-linear"

    layer_set: LayerSet = "quarters"
    min_stride: int = 8
    lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    wds: tuple[float, ...] = (1e-2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        if not self.lrs or not self.wds:
            raise ValueError("lrs and wds need at least one value each")

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set`` that are coarse enough, the last one in any case."""
        named = layers_of(self.layer_set, facts)
        return tuple(n for n in named if facts.strides[n - 1] >= self.min_stride) or named[-1:]

    def levels_of(self, grid: tuple[int, int], size: tuple[int, int]) -> list[Level]:
        """The token grid itself, for boxes of every size."""
        return [Level(grid, (size[0] / grid[0], size[1] / grid[1]))]

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        layers = self.layers(context.facts)
        pairs = tuple((lr, wd) for lr in self.lrs for wd in self.wds)
        grid = tuple((layer, *pair) for layer in layers for pair in pairs)
        indices = context.tokens("train", self.view).indices
        fit, held = held_out(indices, self.holdout, self.seed) if len(grid) > 1 else (tuple(indices), ())
        train, passes = self.gather(context, layers, held)
        start = time.perf_counter()
        heads: tuple[Head, ...] = ()
        best = 0
        if len(grid) > 1:
            swept = self._fit(context, train, passes, dict.fromkeys(layers, pairs), fit, False, "sweep")[0]
            marks = []
            for layer in layers:
                for k in range(len(pairs)):
                    head = _flat(swept[layer], k)
                    marks.append(self.score(context, train.readers[0], held, head, layer))
            heads = tuple(Head(_named(*g), m) for g, m in zip(grid, marks))
            best = int(np.argmax(marks))
        layer, lr, wd = grid[best]
        final, log = self._fit(context, train, passes, {layer: ((lr, wd),)}, indices, True, "refit")
        fitted = time.perf_counter()
        scorer, seconds = self.test(context, _flat(final[layer], 0), layer)
        return Outcome(
            statistics=scorer.statistics(),
            chosen={**_named(layer, lr, wd), "losses": log.tenths()},
            layers=(layer,),
            heads=heads or (Head(_named(layer, lr, wd), None),),
            seconds={"targets": sum(p.seconds for p in passes), "fit": fitted - start, "predict": seconds},
            panels=tuple(scorer.panels),
            warnings=(*scorer.warnings(), *log.warnings(), *self.missed(train, layer, indices)),
            predictions=scorer.predictions,
            analysis=scorer.analysis(),
        )

    def _fit(
        self,
        context: Context,
        train: TrainSet,
        passes: Sequence[TrainBoxes],
        sweep: Mapping[int, Sequence[tuple[float, float]]],
        indices: Sequence[int],
        with_held: bool,
        label: str,
    ) -> tuple[dict[int, LinearFcos], LossLog]:
        """One group of heads a layer, trained side by side; and the losses of the first head."""
        advance = context.progress(label, self.steps)
        groups = {}
        for layer, pairs in sweep.items():
            mean, scale = moments_of(passes, layer, with_held).standardisation(self.norm_eps)
            rates, decays = [p[0] for p in pairs], [p[1] for p in pairs]
            betas = (self.betas[0], self.betas[1])
            groups[layer] = LinearFcos(mean, scale, len(context.train.things), rates, decays, betas, context.device)
        log = LossLog()
        warmup = round(self.warmup * self.steps)
        for step, samples in enumerate(train.batches(indices, self.batch, self.steps)):
            factor = warmup_cosine(step, self.steps, warmup)
            made: dict[tuple[tuple[int, int], ...], Targets] = {}
            for k, (layer, group) in enumerate(groups.items()):
                shapes = tuple(s.grids[layer] for s in samples)
                if shapes not in made:  # layers of one stride share their targets
                    made[shapes] = self.targets_of(samples, layer, context.device)
                x, out = group.forward(torch.cat([s.maps[layer] for s in samples]))
                out.requires_grad_()
                loss = fcos_loss(out, made[shapes], self.alpha, self.gamma).total()
                gradient = torch.autograd.grad(loss.sum(), out)[0]
                group.step(x, gradient, factor)
                if k == 0:
                    log.add(float(loss[0].detach()))
            advance(1)
        return groups, log


def _flat(group: LinearFcos, head: int) -> Map:
    linear = group.export(head)
    return lambda tokens, grid: linear(tokens)


def _named(layer: int, lr: float, wd: float) -> dict[str, float | int]:
    return {"layer": layer, "lr": lr, "wd": wd}


@dataclass(frozen=True)
class FcosSfp(_Fcos):
    """FCOS on ViTDet's simple feature pyramid, made from one layer's tokens alone.

    Attributes:
        stride: the pyramid stands on the deepest layer whose tokens are at most this many pixels wide: a ViT's last, the stage
            before the last of most hierarchical encoders.
        scales: of the levels against the token grid; (4, 2, 1, 0.5) is ViTDet's.
        channels: of pyramid and towers, a multiple of 8.
        convs: 3x3 convolutions of each of the two towers.
        cells: a level takes boxes that reach up to this many of its cells (FCOS: 8), the coarsest everything above.
        lrs: AdamW's learning rates; more than one are chosen from on held-out training images, at the price of one training each.
        wd: weight decay of matrices; norms and biases have none.
        clip_norm: gradients are cut to this norm.
    """

    id: ClassVar[str] = "fcos-sfp"
    version: ClassVar[int] = 2

    stride: float = 16.0
    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    channels: int = 128
    convs: int = 2
    cells: float = 8.0
    lrs: tuple[float, ...] = (1e-3,)
    wd: float = 0.05
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scales(self.scales)
        if self.channels < 8 or self.channels % 8 or self.convs < 0:
            raise ValueError("channels are a multiple of 8, convs not negative")
        if not self.lrs or min(self.cells, self.clip_norm, self.stride) <= 0:
            raise ValueError("lrs need at least one value; cells, clip_norm and stride are above zero")

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The one the pyramid stands on."""
        return (pyramid_layer(facts, self.stride),)

    def levels_of(self, grid: tuple[int, int], size: tuple[int, int]) -> list[Level]:
        """The pyramid's maps."""
        return pyramid_levels(grid, size, self.scales, self.cells)

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        (layer,) = self.layers(context.facts)
        indices = context.tokens("train", self.view).indices
        fit, held = held_out(indices, self.holdout, self.seed) if len(self.lrs) > 1 else (tuple(indices), ())
        train, passes = self.gather(context, (layer,), held)
        start = time.perf_counter()
        heads: tuple[Head, ...] = (Head({"layer": layer, "lr": self.lrs[0]}, None),)
        best = 0
        if held:
            moments = moments_of(passes, layer, False)
            marks = []
            for lr in self.lrs:
                model, _ = self._fit(context, train, moments, layer, fit, lr, f"lr {lr:g}")
                marks.append(self.score(context, train.readers[0], held, _mapped(model), layer))
            heads = tuple(Head({"layer": layer, "lr": lr}, mark) for lr, mark in zip(self.lrs, marks))
            best = int(np.argmax(marks))
        lr = self.lrs[best]
        model, log = self._fit(context, train, moments_of(passes, layer, True), layer, indices, lr, "train")
        fitted = time.perf_counter()
        scorer, seconds = self.test(context, _mapped(model), layer)
        return Outcome(
            statistics=scorer.statistics(),
            chosen={"layer": layer, "lr": lr, "losses": log.tenths()},
            layers=(layer,),
            heads=heads,
            seconds={"targets": sum(p.seconds for p in passes), "fit": fitted - start, "predict": seconds},
            panels=tuple(scorer.panels),
            warnings=(*scorer.warnings(), *log.warnings(), *self.missed(train, layer, indices)),
            predictions=scorer.predictions,
            analysis=scorer.analysis(),
        )

    def _fit(
        self,
        context: Context,
        train: TrainSet,
        moments: Moments,
        layer: int,
        indices: Sequence[int],
        lr: float,
        label: str,
    ) -> tuple[PyramidFcos, LossLog]:
        advance = context.progress(label, self.steps)
        mean, scale = moments.standardisation(self.norm_eps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = PyramidFcos(mean, scale, len(context.train.things), self.channels, self.convs, self.scales)
        model = model.to(context.device).train()
        optimiser = torch.optim.AdamW(decayed(model, self.wd), lr=lr, betas=(self.betas[0], self.betas[1]))
        log = LossLog()
        warmup = round(self.warmup * self.steps)
        for step, samples in enumerate(train.batches(indices, self.batch, self.steps)):
            for group in optimiser.param_groups:
                group["lr"] = lr * warmup_cosine(step, self.steps, warmup)
            parts = []
            for same in by_grid(samples, layer):
                out = model(maps_of(same, layer, context.device))
                targets = self.targets_of(same, layer, context.device)
                parts.append(fcos_loss(out.reshape(1, -1, out.shape[-1]), targets, self.alpha, self.gamma))
            whole = parts[0]
            for part in parts[1:]:
                whole = whole + part
            loss = whole.total()[0]
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
            optimiser.step()
            log.add(float(loss.detach()))
            advance(1)
        return model.eval(), log


def _mapped(model: PyramidFcos) -> Map:
    device = model.shifts.device

    @torch.inference_mode()
    def head(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        x = tokens.to(device, torch.float32).T.reshape(1, -1, *grid)
        out: Tensor = model(x)[0]
        return out

    return head
