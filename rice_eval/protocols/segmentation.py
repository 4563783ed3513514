"""What every segmentation protocol shares: layers, labels, windows back to the image, scoring."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import ImageTokens
from rice_eval.datasets.base import IGNORE, Dataset
from rice_eval.errors import DataError, PlanError
from rice_eval.metrics.iou import IoUStatistics, areas_of, confusion
from rice_eval.probes.linear import LinearMap
from rice_eval.probes.targets import SparseTargets, TargetStore, cell_histograms, concatenate
from rice_eval.protocols.base import Panel
from rice_eval.views import Frame

__all__ = [
    "LAYER_SETS",
    "FrameLabels",
    "HeadTest",
    "ImageLabels",
    "LayerSet",
    "Scorer",
    "TrainPass",
    "check_choice",
    "check_optimiser",
    "check_trained",
    "checked_labels",
    "held_out",
    "joined",
    "label_map",
    "layers_of",
    "predict",
    "scaled_logits",
]

LayerSet = Literal["last", "last4", "quarters", "all"]
LAYER_SETS: tuple[LayerSet, ...] = ("last", "last4", "quarters", "all")
Labels = NDArray[np.int64]

_TOGETHER = 1 << 23
"""Elements of ``(C, H, W)`` logits that are upsampled in one go: 32 MiB."""


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """ValueError (a usage error by ``configure``) unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name} '{value}' is not one of {', '.join(known)}")


def check_optimiser(rates: Sequence[float], decays: Sequence[float], betas: Sequence[float] = (0.9, 0.999)) -> None:
    """ValueError unless AdamW can take these."""
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"learning rates are above 0, not {', '.join(f'{rate:g}' for rate in rates)}")
    if not all(0 <= decay < math.inf for decay in decays):
        raise ValueError(f"weight decays are 0 or more, not {', '.join(f'{decay:g}' for decay in decays)}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are in [0, 1), not {', '.join(f'{beta:g}' for beta in betas)}")


def check_trained(what: str, *parameters: Tensor) -> None:
    """Stop a run whose head is NaN or infinite: its argmax would be class 0 everywhere, and look like a score.

    Raises:
        PlanError: a parameter that is not finite.
    """
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise PlanError(
            f"protocol '{what}': training diverged, the head is not finite", "lower the learning rate (--set)"
        )


def layers_of(layer_set: LayerSet, facts: EncoderFacts) -> tuple[int, ...]:
    """Layers by name: the last, the last four, those at a quarter, half, three quarters and the end, or all. From 1, ascending."""
    depth = facts.layers
    if layer_set == "last":
        return (depth,)
    if layer_set == "last4":
        return tuple(range(max(1, depth - 3), depth + 1))
    if layer_set == "quarters":
        return tuple(sorted({max(1, round(depth * k / 4)) for k in (1, 2, 3, 4)}))
    return tuple(range(1, depth + 1))


def held_out(indices: Sequence[int], share: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split images into those fitted on and those held out, by a seeded shuffle; at least one of each.

    Raises:
        PlanError: fewer than two images.
    """
    if len(indices) < 2:
        raise PlanError(
            f"choosing hyper-parameters needs at least 2 training images, this split has {len(indices)}",
            "give one value of each hyper-parameter, or a larger training split",
        )
    order = np.random.default_rng(seed).permutation(len(indices))
    count = min(max(1, round(share * len(indices))), len(indices) - 1)
    out = sorted(indices[k] for k in order[:count])
    return tuple(sorted(indices[k] for k in order[count:])), tuple(out)


def checked_labels(dataset: Dataset, index: int) -> Labels:
    """``dataset.semantic(index)``, its size and range checked.

    Raises:
        DataError: labels of another size than the image, or outside the classes.
    """
    labels = np.asarray(dataset.semantic(index))
    where = f"dataset '{dataset.name}', split '{dataset.split}', image '{dataset.image_id(index)}'"
    if labels.shape != tuple(dataset.size(index)):
        raise DataError(f"{where}: mask {labels.shape} and image {tuple(dataset.size(index))} differ in size")
    valid = labels[labels != IGNORE]
    if valid.size and (valid.min() < 0 or valid.max() >= len(dataset.classes)):
        bad = int(valid.max()) if valid.max() >= len(dataset.classes) else int(valid.min())
        raise DataError(f"{where}: label {bad} in the mask, the classes are 0 to {len(dataset.classes) - 1}")
    return labels


def label_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample logits bilinearly (corners not aligned, as mmseg) and take the best class of each pixel.

    Few classes on a small image are upsampled together. Otherwise classes are upsampled one by one against the running best, so
    that memory stays at a few label maps whatever C is; the result is the same (ties go to the lower class).

    Args:
        logits: ``(C, h, w)``.
        size: ``(H, W)``.

    Returns:
        ``(H, W)`` int16 classes.
    """

    def grown(channel: Tensor) -> Tensor:
        if tuple(channel.shape) == tuple(size):
            return channel
        return F.interpolate(channel[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]

    if logits.shape[0] * size[0] * size[1] <= _TOGETHER and tuple(logits.shape[1:]) != tuple(size):
        # With the classes of a pixel side by side both steps are several times faster. A clone, since a transposed view of one
        # image passes for either memory format and would be upsampled in the slow one.
        side_by_side = logits[None].clone(memory_format=torch.channels_last)
        together = F.interpolate(side_by_side, size=size, mode="bilinear", align_corners=False)[0]
        return together.permute(1, 2, 0).argmax(dim=-1).to(torch.int16)
    best = grown(logits[0]).clone()
    labels = torch.zeros(size, dtype=torch.int16, device=logits.device)
    for c in range(1, logits.shape[0]):
        rival = grown(logits[c])
        better = rival > best
        labels.masked_fill_(better, c)
        best = torch.where(better, rival, best)
    return labels


def scaled_logits(logits: Sequence[Tensor], frames: Sequence[Frame], squeeze: bool = False) -> Tensor:
    """Logits of a view's windows to logits of the scaled image, as mmseg's slide inference: upsample, cut padding off, average.

    Args:
        logits: F tensors ``(C, gh, gw)``.
        frames: the F windows.
        squeeze: resize the logits of a padded window straight to what it shows, without cutting the padding off first: what
            the published code does where the backbone pads on its own (DINOv2's CenterPadding), a shift of a few pixels.

    Returns:
        ``(C, h, w)`` of the scaled image, not mirrored.
    """
    height, width = frames[0].scaled
    total = logits[0].new_zeros(logits[0].shape[0], height, width)
    count = logits[0].new_zeros(height, width)
    for part, frame in zip(logits, frames):
        top, left, bottom, right = frame.window
        shown = (bottom - top, right - left)
        size = shown if squeeze else frame.size
        grown = F.interpolate(part[None], size=size, mode="bilinear", align_corners=False)[0]
        if frame.flip:
            grown = grown.flip(-1)
        y, x = (0, 0) if squeeze else (top - frame.top, left - frame.left)
        total[:, top:bottom, left:right] += grown[:, y : y + shown[0], x : x + shown[1]]
        count[top:bottom, left:right] += 1
    return total / count


def predict(logits: Sequence[Tensor], frames: Sequence[Frame]) -> NDArray[np.int16]:
    """``(H, W)`` classes of the original image from the logits ``(C, gh, gw)`` of its windows.

    A single window without padding is upsampled straight to the image; otherwise windows are first put together at the scale
    the encoder saw.
    """
    frame = frames[0]
    whole = (0, 0, frame.size[1], frame.size[0])
    if len(frames) == 1 and frame.content == whole and frame.scaled == frame.size:
        single = logits[0].flip(-1) if frame.flip else logits[0]
        labels = label_map(single, frame.image_size)
    else:
        labels = label_map(scaled_logits(logits, frames), frame.image_size)
    out: NDArray[np.int16] = labels.cpu().numpy()
    return out


class FrameLabels:
    """A consumer's ``annotate`` for training: labels of every frame, int16, ``IGNORE`` in the padding."""

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> tuple[NDArray[np.int16], ...]:
        """F arrays ``(h, w)``."""
        labels = checked_labels(dataset, index)
        return tuple(frame.mask(labels, IGNORE).astype(np.int16) for frame in frames)

    def __getstate__(self) -> dict[str, Any]:
        # A decoding worker annotates and nothing else: sums and open files stay in the main process.
        return {}


class TrainPass(FrameLabels):
    """Rides on the training pass: label histograms to temporary files, and whatever ``take`` adds up.

    Args:
        layers: layers read.
        facts: of the encoder.
        advance: called with 1 after each image.
        sides: layer -> n where its tokens are cut into n * n cells with histograms of their own; 1 where it has no entry.
    """

    def __init__(
        self,
        layers: Sequence[int],
        facts: EncoderFacts,
        advance: Callable[[int], None],
        sides: Mapping[int, int] | None = None,
    ) -> None:
        strides = {layer: facts.strides[layer - 1] for layer in layers}
        # Layers of one stride share a grid and its cells, so they share targets.
        by_stride = {stride: TargetStore() for stride in set(strides.values())}
        self.stores = {layer: by_stride[strides[layer]] for layer in layers}
        self._sides = {layer: (sides or {}).get(layer, 1) for layer in layers}
        self._advance = advance
        self.labelled = False
        self.seconds = 0.0

    def consume(self, tokens: ImageTokens) -> None:
        """Take in one image."""
        start = time.perf_counter()
        made: dict[int, SparseTargets] = {}
        for layer, store in self.stores.items():
            if id(store) not in made:
                frames = zip(tokens.target, tokens.grids[layer])
                side = self._sides[layer]
                made[id(store)] = concatenate([cell_histograms(mask, grid, side, IGNORE) for mask, grid in frames])
                store.add(tokens.index, made[id(store)])
                self.labelled = self.labelled or bool(len(made[id(store)].tokens))
            self.take(tokens.index, layer, joined(tokens.patches[layer]), made[id(store)])
        self.seconds += time.perf_counter() - start
        self._advance(1)

    def take(self, index: int, layer: int, patches: Tensor, targets: SparseTargets) -> None:
        """One layer of one image: ``(N, D)`` tokens of all frames and their histograms."""
        raise NotImplementedError


def joined(frames: Sequence[Tensor]) -> Tensor:
    """F tensors ``(N_f, D)`` as one ``(N, D)``."""
    return frames[0] if len(frames) == 1 else torch.cat(list(frames))


class ImageLabels:
    """A consumer's ``annotate`` for testing: labels of the original image, int16."""

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> NDArray[np.int16]:
        """``(H, W)``."""
        return checked_labels(dataset, index).astype(np.int16)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class HeadTest(ImageLabels):
    """Reads the test split once, riding on its pass: logits of one layer's head, back to the image, scored.

    Args:
        head: ``(N, D)`` tokens -> ``(N, C)`` logits.
        layer: the layer it reads.
        scorer: where the areas go.
        advance: called with 1 after each image.
    """

    def __init__(self, head: LinearMap, layer: int, scorer: Scorer, advance: Callable[[int], None]) -> None:
        self._head, self._layer, self._scorer, self._advance = head, layer, scorer, advance
        self.seconds = 0.0

    def consume(self, tokens: ImageTokens) -> None:
        """Predict and score one image."""
        start = time.perf_counter()
        logits = []
        for patches, (h, w) in zip(tokens.patches[self._layer], tokens.grids[self._layer]):
            logits.append(self._head(patches).T.reshape(-1, h, w))
        self._scorer.add(tokens.index, tokens.target, predict(logits, tokens.frames))
        self.seconds += time.perf_counter() - start
        self._advance(1)


class Scorer:
    """Collects areas image by image, and what the report draws.

    Args:
        dataset: the test split.
        indices: its images that count, in order.
        panels: how many images to keep for the report, evenly spread.
        keep: whether every prediction is kept.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], panels: int, keep: bool) -> None:
        self._dataset = dataset
        self._classes = len(dataset.classes)
        spread = np.linspace(0, len(indices) - 1, min(panels, len(indices))).round().astype(int)
        self._shown = {indices[k] for k in spread}
        self._matrix = np.zeros((self._classes, self._classes), dtype=np.int64)
        self._areas: dict[int, NDArray[np.int64]] = {}
        self.panels: list[Panel] = []
        self.predictions: dict[str, Any] | None = {} if keep else None

    def add(self, index: int, truth: NDArray[Any], prediction: NDArray[np.int16]) -> None:
        """Score one image: ``(H, W)`` labels against ``(H, W)`` classes."""
        matrix = confusion(prediction, truth, self._classes, IGNORE)
        self._matrix += matrix
        self._areas[index] = areas_of(matrix)
        name = self._dataset.image_id(index)
        if index in self._shown:
            self.panels.append(Panel(name, index, truth, prediction))
        if self.predictions is not None:
            self.predictions[name] = prediction

    def statistics(self) -> IoUStatistics:
        """The statistics of all images so far."""
        order = sorted(self._areas)
        areas = np.stack([self._areas[i] for i in order]) if order else np.zeros((0, 3, self._classes), dtype=np.int64)
        ids = [self._dataset.image_id(i) for i in order]
        return IoUStatistics(ids, areas, self._dataset.classes, self._matrix)

    def state(self) -> dict[str, Any]:
        """What another process needs to ``merge`` this one's share."""
        return {"areas": self._areas, "matrix": self._matrix, "panels": self.panels, "predictions": self.predictions}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Become the union of every process's share, this one's among them."""
        self._areas = {i: a for state in states for i, a in state["areas"].items()}
        self._matrix = np.sum([state["matrix"] for state in states], axis=0)
        self.panels = sorted((p for state in states for p in state["panels"]), key=lambda panel: panel.index)
        if self.predictions is not None:
            self.predictions = {name: p for state in states for name, p in state["predictions"].items()}

    def warnings(self) -> tuple[str, ...]:
        """Classes that no test image has, in one line."""
        absent = [n for n, row in zip(self._dataset.classes, self._matrix.sum(axis=1)) if not row]
        if not absent:
            return ()
        shown = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        return (f"{len(absent)} of {self._classes} classes do not occur in the test split: {shown}",)
