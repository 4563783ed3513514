"""Protocols ``mask-rcnn-frozen``, ``cascade-mask-rcnn-frozen`` and ``rice-detection``: two-stage detectors on frozen tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import ImageTokens
from rice_eval.errors import MissingExtraError
from rice_eval.metrics.coco import Found
from rice_eval.metrics.coco_masks import BoxMaskStatistics
from rice_eval.metrics.statistics import Statistics
from rice_eval.probes.cascade import UNIT, CascadeRcnn, Instance, Settings, Wanted
from rice_eval.probes.linear import Moments, warmup_cosine
from rice_eval.probes.pyramid import PlainPyramid, SimplePyramid, Standardise, check_scales
from rice_eval.protocols.base import Context, Head, Outcome
from rice_eval.protocols.detection import (
    BoxScorer,
    DetectionProtocol,
    DetectionTest,
    Sample,
    TrainSet,
    pyramid_layer,
    to_image,
)
from rice_eval.protocols.detection_train import LossLog, by_grid, decayed, maps_of, moments_of
from rice_eval.views import Frame

__all__ = ["CascadeMaskRcnnFrozen", "MaskRcnnFrozen", "RiceDetection"]


def _grows(part: str) -> bool:
    """Losses of boxes, and of the stages behind the first: proposals come to overlap targets by what those ask for, and then count."""
    return part.startswith("box") or part in ("class1", "class2")


@dataclass(frozen=True)
class _TwoStage(DetectionProtocol):
    """Proposals, box stages and masks on a pyramid over a frozen layer. Boxes are regressed for all classes at once.

    Attributes:
        stride: the pyramid stands on the deepest layer whose tokens are at most this many pixels wide: a ViT's last, the stage
            before the last of most hierarchical encoders.
        scales: of the levels against the token grid; the coarsest stands for ViTDet's further max-pooled level.
        hidden: width of the box heads' two layers.
        mask_channels: width of the mask head's four convolutions.
        masks: whether masks are learnt and scored; false needs boxes alone (Faster R-CNN).
        ious: IoU with a target from which a box is one, a stage.
        samples: boxes an image that the first stage learns from.
        proposals: an image, after their suppression.
        lr, wd: AdamW's rate and decay; decay is on matrices and kernels alone.
        clip_norm: gradients are cut to this norm.
    """

    version: ClassVar[int] = 2

    stride: float = 16.0
    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5, 0.25)
    hidden: int = 1024
    mask_channels: int = 256
    masks: bool = True
    ious: tuple[float, ...] = (0.5,)
    samples: int = 256
    proposals: int = 500
    nms_iou: float = 0.5
    lr: float = 1e-3
    wd: float = 0.05
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scales(self.scales)
        if not 1 <= len(self.ious) <= 3 or list(self.ious) != sorted(self.ious):
            raise ValueError("ious are one to three rising values")
        if min(self.hidden, self.mask_channels, self.samples, self.proposals) < 1:
            raise ValueError("hidden, mask_channels, samples and proposals are at least 1")
        if min(self.lr, self.clip_norm, self.stride) <= 0:
            raise ValueError("lr, clip_norm and stride are above zero")

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The one the pyramid stands on."""
        return (pyramid_layer(facts, self.stride),)

    def pyramid(self, width: int) -> tuple[nn.Module, int]:
        """The pyramid on a map of ``width`` channels, and the channels of its levels."""
        raise NotImplementedError

    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the protocol itself."""
        return ()

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``. Nothing is chosen: one setting, trained on all of train."""
        (layer,) = self.layers(context.facts)
        indices = context.tokens("train", self.view).indices
        train, passes = self.gather(context, (layer,), (), self.masks)
        start = time.perf_counter()
        model, log = self._fit(context, train, moments_of(passes, layer, True), layer, indices)
        fitted = time.perf_counter()
        source = context.tokens("test", self.view)
        scorer = BoxScorer(context.test, source.indices, context.panels, context.keep_predictions)
        consumer = DetectionTest(
            lambda tokens: self._found(model, tokens, layer, scorer.most),
            scorer,
            context.progress("detect", len(source.indices)),
        )
        source.consume(consumer)
        statistics: Statistics = scorer.statistics()
        if self.masks:
            statistics = BoxMaskStatistics(scorer.statistics(), scorer.statistics("segm"))
        return Outcome(
            statistics=statistics,
            chosen={"layer": layer, "lr": self.lr, "losses": log.tenths(), "loss_parts": log.parts()},
            layers=(layer,),
            heads=(Head({"layer": layer, "lr": self.lr}, None),),
            seconds={
                "targets": sum(p.seconds for p in passes),
                "fit": fitted - start,
                "predict": consumer.seconds,
            },
            panels=tuple(scorer.panels),
            warnings=(*self.notes(), *scorer.warnings(), *log.warnings()),
            predictions=scorer.predictions,
            analysis=scorer.analysis(),
        )

    def _model(self, context: Context, moments: Moments) -> CascadeRcnn:
        mean, scale = moments.standardisation(self.norm_eps)
        settings = Settings(
            len(context.train.things), self.ious, self.hidden, self.samples, self.proposals, self.candidates,
            self.masks, self.mask_channels,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            pyramid, channels = self.pyramid(len(mean))
            return CascadeRcnn(Standardise(mean, scale), pyramid, channels, self.scales, settings)

    def _fit(
        self, context: Context, train: TrainSet, moments: Moments, layer: int, indices: Sequence[int]
    ) -> tuple[CascadeRcnn, LossLog]:
        advance = context.progress("train", self.steps)
        model = self._model(context, moments).to(context.device).train()
        optimiser = torch.optim.AdamW(decayed(model, self.wd), lr=self.lr, betas=(self.betas[0], self.betas[1]))
        log = LossLog(_grows)
        warmup = round(self.warmup * self.steps)
        # Boxes are sampled at random: from the seed, and without touching the caller's generator.
        with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            for step, samples in enumerate(train.batches(indices, self.batch, self.steps)):
                for group in optimiser.param_groups:
                    group["lr"] = self.lr * warmup_cosine(step, self.steps, warmup)
                optimiser.zero_grad()
                whole = 0.0
                parts: dict[str, float] = {}
                for same in by_grid(samples, layer):
                    wanted = [_wanted(s, layer, context.device) for s in same]
                    losses = model.losses(maps_of(same, layer, context.device), wanted)
                    share = len(same) / len(samples)
                    loss = torch.stack(list(losses.values())).sum() * share
                    loss.backward()  # type: ignore[no-untyped-call]
                    whole += float(loss.detach())
                    for name, value in losses.items():
                        parts[name] = parts.get(name, 0.0) + float(value.detach()) * share
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
                optimiser.step()
                log.add(whole, parts)
                advance(1)
        return model.eval(), log

    @torch.inference_mode()
    def _found(self, model: CascadeRcnn, tokens: ImageTokens, layer: int, most: int) -> Found:
        """Detections of all frames in the image, suppressed together; masks as run lengths."""
        from torchvision.ops import batched_nms

        device = next(model.parameters()).device
        parts: list[tuple[NDArray[np.float64], Instance, Frame]] = []
        for patches, grid, frame in zip(tokens.patches[layer], tokens.grids[layer], tokens.frames):
            x = patches.to(device, torch.float32).T.reshape(1, -1, *grid)
            found = model.detect(x, self.score_threshold, self.nms_iou, most)
            sx, sy = _pixels(frame, grid)
            boxes = found.boxes.double().cpu() * torch.tensor([sx, sy, sx, sy], dtype=torch.float64)
            parts.append((to_image(boxes, frame), found, frame))
        box = np.concatenate([p[0] for p in parts])
        score = torch.cat([p[1].scores for p in parts]).cpu()
        label = torch.cat([p[1].labels for p in parts]).cpu()
        solid = torch.from_numpy((box[:, 2:] > box[:, :2]).all(axis=1))
        kept = torch.nonzero(solid)[:, 0]
        kept = kept[batched_nms(torch.from_numpy(box)[kept].float(), score[kept].float(), label[kept], self.nms_iou)]
        rows = kept[:most].numpy()
        masks = None
        if self.masks:
            drawn = [
                m.flip(-1) if frame.flip else m for _, found, frame in parts for m in cast(Tensor, found.masks).cpu()
            ]
            masks = tuple(_run_lengths(drawn[k], box[k], tokens.frames[0].image_size) for k in rows)
        return Found(box[rows], score.double().numpy()[rows], label.numpy()[rows], masks)


def _pixels(frame: Frame, grid: tuple[int, int]) -> tuple[float, float]:
    """``(x, y)`` pixels of the frame a unit."""
    return frame.size[1] / (grid[1] * UNIT), frame.size[0] / (grid[0] * UNIT)


def _wanted(sample: Sample, layer: int, device: torch.device) -> Wanted:
    t = sample.targets
    sx, sy = _pixels(sample.frame, sample.grids[layer])
    boxes = torch.from_numpy(t.boxes) / torch.tensor([sx, sy, sx, sy])
    masks = None
    if t.masks is not None:
        drawn = [sample.frame.mask(_decoded(m), 0) > 0 for m in t.masks]
        stack = np.stack(drawn) if drawn else np.zeros((0, *sample.frame.size), bool)
        masks = torch.from_numpy(stack.astype(np.uint8)).to(device)
    return Wanted(boxes.to(device, torch.float32), torch.from_numpy(t.labels).to(device), masks, (sx, sy))


def _coco_mask() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise MissingExtraError.of("pycocotools", "detection", "instance masks (boxes alone: masks=false)") from error
    return mask


def _decoded(mask: Mapping[str, Any]) -> NDArray[np.int64]:
    return np.asarray(_coco_mask().decode(dict(mask)), dtype=np.int64)


def _run_lengths(mask: Tensor, box: NDArray[np.float64], size: tuple[int, int]) -> Mapping[str, Any]:
    """A ``(28, 28)`` probability inside its box of the image, thresholded at one half, as COCO's run lengths."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    pasted = paste_masks_in_image(mask[None, None].float(), torch.from_numpy(box)[None].float(), size)[0, 0]
    drawn = np.asfortranarray((pasted.numpy() > 0.5).astype(np.uint8))
    return cast(Mapping[str, Any], _coco_mask().encode(drawn))


@dataclass(frozen=True)
class MaskRcnnFrozen(_TwoStage):
    """Mask R-CNN on ViTDet's simple feature pyramid.

    Attributes:
        channels: of the pyramid.
    """

    id: ClassVar[str] = "mask-rcnn-frozen"

    channels: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1:
            raise ValueError("channels are at least 1")

    def pyramid(self, width: int) -> tuple[nn.Module, int]:
        """Learned levels of ``channels`` each."""
        return SimplePyramid(width, self.channels, self.scales), self.channels


@dataclass(frozen=True)
class CascadeMaskRcnnFrozen(MaskRcnnFrozen):
    """The same with three box stages at IoU 0.5, 0.6 and 0.7; classes are the mean of the three (arXiv 1712.00726)."""

    id: ClassVar[str] = "cascade-mask-rcnn-frozen"

    ious: tuple[float, ...] = (0.5, 0.6, 0.7)


@dataclass(frozen=True)
class RiceDetection(_TwoStage):
    """RICE's detection probe (arXiv 2507.20025, Table 3): the cascade on a pyramid without parameters, 4 to 0.25 times the map.

    The paper prints neither schedule, rate nor layer: those here are ours, and so a score is not comparable with its table.
    Levels have the encoder's own width. Features are standardised channel by channel first, by fixed numbers.
    """

    id: ClassVar[str] = "rice-detection"

    ious: tuple[float, ...] = (0.5, 0.6, 0.7)

    def pyramid(self, width: int) -> tuple[nn.Module, int]:
        """Max-pooled and repeated cells; every level has the map's width."""
        return PlainPyramid(self.scales), width

    def notes(self) -> tuple[str, ...]:
        """The schedule is not the paper's."""
        return ("schedule ours, not published: not comparable with the table of the RICE paper",)
