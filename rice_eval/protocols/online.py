"""Online engine of the published recipes: an augmented crop and a forward for every image of every step.

Run under ``torchrun`` it splits each step's images over the processes; the batch, its statistics and the loss stay those of one
process.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Samples

from rice_eval.adapters.base import Encoder, EncoderFacts
from rice_eval.datasets.base import IGNORE, Annotation, Dataset
from rice_eval.errors import DataError, UsageError
from rice_eval.probes.training_state import TrainingState
from rice_eval.protocols.augment import AUGMENTS, Augment, AugmentName
from rice_eval.protocols.base import Context, Head, Outcome, Protocol
from rice_eval.protocols.online_head import (
    PixelHead,
    Precision,
    count_over_processes,
    features_of,
    join_processes,
    pixel_loss,
    shared,
    world,
)
from rice_eval.protocols.online_infer import averaged_views, check_scales, mean_colour, segment
from rice_eval.protocols.schedules import SCHEDULES, ScheduleName, schedule
from rice_eval.protocols.segmentation import (
    LAYER_SETS,
    LayerSet,
    Scorer,
    check_choice,
    check_optimiser,
    check_trained,
    checked_labels,
    layers_of,
)
from rice_eval.views import View

__all__ = ["OnlineLinear", "evaluate_online", "score_online"]

_Image = NDArray[np.uint8]
_Labels = NDArray[np.int64]
_Random = np.random.Generator
_Sample = tuple[_Image, _Labels]


@dataclass(frozen=True)
class OnlineLinear(Protocol):
    """A linear head trained with augmentation and a forward for every step.

    Attributes:
        view: of the test images.
        tokens: ``online``: nothing is banked.
        layer_set: layers whose features are concatenated.
        head_norm: whether a batch norm comes before the linear map.
        dropout: share of channels dropped in training.
        init: of the linear map: ``normal`` N(0, 0.01), or ``uniform``, torch's default.
        lr, wd, betas: AdamW's, on every parameter.
        steps, batch: optimiser steps, and images a step (over all processes).
        schedule, warmup, warmup_ratio, power: see ``rice_eval.protocols.schedules``.
        augment, side, ratios, crop, cat_max_ratio, flip, brightness, contrast, saturation, hue: see
            ``rice_eval.protocols.augment``; ``side`` and ``crop`` in pixels, or in patches as in ``32p``. ``augment`` ``none`` trains
            on ``view`` as it is, which must give one window of one size an image: what the banked protocols see.
        average_ignored: see ``rice_eval.protocols.online_head.pixel_loss``.
        precision: of the encoder's forward.
        squeeze: see ``rice_eval.protocols.segmentation.scaled_logits``; in training too.
        scales, mirror: of test-time augmentation.
        seed: of the head's start, the order of images and the augmentation.
    """

    kind: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"semantic"})
    metric: ClassVar[str] = "miou"
    distributed: ClassVar[bool] = True

    view: str = "short=512,slide=341,pad=patch,interp=plain"
    tokens: str = "online"
    layer_set: LayerSet = "last"
    head_norm: bool = True
    dropout: float = 0.0
    init: Literal["normal", "uniform"] = "normal"
    lr: float = 1e-3
    wd: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    steps: int = 40_000
    batch: int = 16
    schedule: ScheduleName = "poly"
    warmup: int = 1500
    warmup_ratio: float = 1e-6
    power: float = 1.0
    augment: AugmentName = "mmseg"
    side: str = "512"
    ratios: tuple[float, ...] = (0.5, 2.0)
    crop: str = "512"
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    brightness: float = 32.0
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.1
    average_ignored: bool = True
    precision: Precision = "fp32"
    squeeze: bool = True
    scales: tuple[float, ...] = (1.0,)
    mirror: bool = False

    def __post_init__(self) -> None:
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        check_choice("init", self.init, ("normal", "uniform"))
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("augment", self.augment, AUGMENTS)
        check_choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        check_choice("tokens", self.tokens, ("online",))
        View.parse(f"square={self.side}")
        View.parse(f"square={self.crop}")
        if self.augment == "none" and View.parse(self.view).base not in ("square", "letterbox"):
            raise ValueError("augment none needs a view of one size, such as square=224")
        if len(self.betas) != 2 or len(self.ratios) != 2 or not self.scales:
            raise ValueError("betas and ratios have two values each, scales at least one")
        if min(self.steps, self.batch) < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError("steps and batch are at least 1, and warmup is no longer than the training")
        if not 0 <= self.dropout < 1 or not 0 <= self.flip <= 1:
            raise ValueError("dropout is in [0, 1) and flip in [0, 1]")
        check_optimiser((self.lr,), (self.wd,), self.betas)
        check_scales(self.scales)
        amounts = (self.warmup_ratio, self.power, self.brightness, self.contrast, self.saturation)
        if not all(0 <= amount < math.inf for amount in amounts):
            raise ValueError("warmup_ratio, power, brightness, contrast and saturation are 0 or more")
        if not 0 <= self.hue <= 0.5 or not 0 < self.cat_max_ratio <= 1:
            raise ValueError("hue is in [0, 0.5] and cat_max_ratio in (0, 1]")
        if not 0 < self.ratios[0] <= self.ratios[1] < math.inf:
            raise ValueError("ratios are above 0, the smaller one first")

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set``."""
        return layers_of(self.layer_set, facts)

    def views(self) -> dict[str, tuple[str, ...]]:
        """None: nothing is read from the bank."""
        return {"train": (), "test": ()}

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``. The settings are the recipe's, so nothing is held out and nothing chosen."""
        join_processes(context.device)
        counted = _Count()
        start = time.perf_counter()
        head, resumed = self.fit(context, counted)
        fitted = time.perf_counter()
        layers = self.layers(context.facts)
        scorer, tested = evaluate_online(
            context, head, layers, self.norm, self.view, self.scales, self.mirror, self.squeeze, self.precision
        )
        settings = {"layers": list(layers), "lr": self.lr, "wd": self.wd}
        notes = (f"training went on from step {resumed} of a killed run",) if 0 < resumed < self.steps else ()
        return Outcome(
            statistics=scorer.statistics(),
            chosen=settings,
            layers=layers,
            heads=(Head(settings, None),),
            seconds={"fit": fitted - start, "predict": time.perf_counter() - fitted},
            panels=tuple(scorer.panels),
            warnings=(*notes, *scorer.warnings()),
            predictions=scorer.predictions,
            forwards=count_over_processes(counted.images, context.device) + tested,
        )

    def augmentation(self, patch: int, fill: tuple[int, int, int]) -> Callable[[_Image, _Labels, _Random], _Sample]:
        """The training view for an encoder of this patch."""
        if self.augment == "none":
            return partial(_as_tested, View.parse(self.view).resolve(patch), fill)
        return Augment(
            kind=self.augment,
            side=View.parse(f"square={self.side}").resolve(patch).side,
            ratios=(self.ratios[0], self.ratios[1]),
            crop=View.parse(f"square={self.crop}").resolve(patch).side,
            cat_max_ratio=self.cat_max_ratio,
            flip=self.flip,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
            fill=fill,
        )

    def fit(self, context: Context, counted: Callable[[int], None] = lambda n: None) -> tuple[PixelHead, int]:
        """Train the head, going on from a saved state where there is one.

        Returns:
            The head in eval mode, and the step it went on from.

        Raises:
            UsageError: a batch that the processes can't share evenly.
            DataError: no training image.
        """
        rank, processes = world()
        if self.batch % processes:
            raise UsageError(
                f"a batch of {self.batch} does not split over {processes} processes",
                "start another number of processes",
            )
        if not len(context.train):
            raise DataError(f"dataset '{context.train.name}' has no training image", "check --data")
        encoder, facts = context.encoder(), context.facts
        layers = self.layers(facts)
        width = sum(facts.widths[layer - 1] for layer in layers)
        classes = len(context.train.classes)
        head = PixelHead(width, classes, self.head_norm, self.dropout, self.init, self.seed).to(context.device)
        optimiser = torch.optim.AdamW(
            head.parameters(), lr=self.lr, betas=(self.betas[0], self.betas[1]), weight_decay=self.wd
        )
        factor = schedule(self.schedule, self.steps, self.warmup, self.warmup_ratio, self.power)
        checkpoint = TrainingState(
            context.scratch,
            "online",
            {"protocol": self.hash, "encoder": facts.sha256, "train": context.train.fingerprint, "classes": classes},
        )
        state = shared(checkpoint.load() if rank == 0 else None)
        first = 0
        if state is not None:
            head.load_state_dict(state["head"])
            optimiser.load_state_dict(state["optimiser"])
            first = int(state["step"])
        samples = _Crops(
            context.train, self.augmentation(encoder.multiple, mean_colour(facts.mean)), self.seed, self.batch
        )
        head.train()
        advance = context.progress("steps", self.steps)
        advance(first)
        for step, (images, labels) in enumerate(
            samples.batches(first, self.steps, rank, processes, context.device), first
        ):
            for group in optimiser.param_groups:
                group["lr"] = self.lr * factor(step)
            padded = _padded(images.to(context.device).float() / 255, encoder, facts)
            features = features_of(encoder, padded, layers, self.norm, self.precision)
            counted(len(images))
            slots = range(rank, self.batch, processes)
            logits = head(features, [step * self.batch + slot + 1_000_003 * self.seed for slot in slots])
            if not self.squeeze:
                logits = _cut(logits, padded, images)
            optimiser.zero_grad()
            pixel_loss(logits, labels.to(context.device), self.average_ignored)
            _sum_gradients(head)
            optimiser.step()
            advance(1)
            if rank == 0:
                last = step + 1 == self.steps
                checkpoint.save(
                    {"head": head.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}, force=last
                )
        check_trained(self.id, *head.state_dict().values())
        return head.eval(), first


def evaluate_online(
    context: Context,
    head: PixelHead,
    layers: Sequence[int],
    norm: bool,
    view: str,
    scales: Sequence[float],
    mirror: bool,
    squeeze: bool,
    precision: Precision,
) -> tuple[Scorer, int]:
    """Score a head on the test split with forwards of its own; see ``score_online``."""
    encoder = context.encoder()

    def logits_of(images: Tensor) -> Tensor:
        out: Tensor = head(features_of(encoder, images, layers, norm, precision))
        return out

    return score_online(context, averaged_views(view, encoder.multiple, scales, mirror), logits_of, squeeze)


def score_online(
    context: Context, views: Sequence[View], logits_of: Callable[[Tensor], Tensor], squeeze: bool
) -> tuple[Scorer, int]:
    """Predict and score the test split, its images shared by all processes.

    Returns:
        The scorer and the windows pushed through the encoder, the same in every process.
    """
    join_processes(context.device)
    rank, processes = world()
    indices = range(len(context.test))
    scorer = Scorer(context.test, indices, context.panels, context.keep_predictions)
    counted = _Count()
    advance = context.progress("predict", len(indices))
    fill = mean_colour(context.facts.mean)
    for index, labels in segment(context.test, indices[rank::processes], views, fill, logits_of, squeeze, counted):
        scorer.add(index, checked_labels(context.test, index).astype(np.int16), labels)
        advance(1)
    if processes > 1:
        parts: list[Any] = [None] * processes
        dist.all_gather_object(parts, scorer.state())
        scorer.merge(parts)
    return scorer, count_over_processes(counted.images, context.device)


def _as_tested(view: View, fill: tuple[int, int, int], image: _Image, labels: _Labels, rng: _Random) -> _Sample:
    """A training sample that is the test view."""
    ((window, frame),) = view.apply(image, fill)
    return window, frame.mask(labels, IGNORE)


class _Count:
    """Counts images pushed through the encoder in this process."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, n: int) -> None:
        self.images += n


class _Crops(Samples[tuple[Tensor, Tensor]]):
    """Augmented crops by position: position = step * batch + slot; epochs are seeded shuffles, one after the other."""

    def __init__(
        self, dataset: Dataset, augment: Callable[[_Image, _Labels, _Random], _Sample], seed: int, batch: int
    ) -> None:
        self._dataset, self._augment, self._seed, self._batch = dataset, augment, seed, batch
        self._epoch: tuple[int, np.ndarray[Any, Any]] = (-1, np.zeros(0, dtype=np.int64))

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(position, len(self._dataset))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._dataset)))
        index = int(self._epoch[1][place])
        labels = checked_labels(self._dataset, index)
        rng = np.random.default_rng((self._seed, 2, position))
        crop, cut = self._augment(self._dataset.image(index), labels, rng)
        return (
            torch.from_numpy(np.array(crop)).permute(2, 0, 1),
            torch.from_numpy(np.array(cut, dtype=np.int64)),
        )

    def batches(
        self, first: int, steps: int, rank: int, processes: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of every step from ``first`` on: images uint8 and labels."""
        positions = [
            step * self._batch + slot for step in range(first, steps) for slot in range(rank, self._batch, processes)
        ]
        workers = min(8, (os.cpu_count() or 1) // 2) if device.type == "cuda" else 0
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            self,
            batch_size=self._batch // processes,
            sampler=positions,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            multiprocessing_context="spawn" if workers else None,
        )
        yield from loader


def _padded(images: Tensor, encoder: Encoder, facts: EncoderFacts) -> Tensor:
    """Pad a batch to the encoder's multiple, centred, with its mean (zeros after normalisation)."""
    step = encoder.multiple
    down, right = (-images.shape[2]) % step, (-images.shape[3]) % step
    if not down and not right:
        return images
    mean = torch.tensor(facts.mean, device=images.device).view(1, 3, 1, 1)
    sides = (right // 2, right - right // 2, down // 2, down - down // 2)
    return F.pad(images - mean, sides) + mean


def _cut(logits: Tensor, padded: Tensor, images: Tensor) -> Tensor:
    """Logits of a padded crop at the crop's own pixels."""
    (full_h, full_w), (h, w) = padded.shape[-2:], images.shape[-2:]
    grown = F.interpolate(logits, size=(full_h, full_w), mode="bilinear", align_corners=False)
    top, left = (full_h - h) // 2, (full_w - w) // 2
    return grown[:, :, top : top + h, left : left + w]


def _sum_gradients(head: PixelHead) -> None:
    if world()[1] > 1:
        for parameter in head.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
