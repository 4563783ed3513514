"""The head of the online recipes, its loss at pixel resolution, and what several processes need to agree."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from rice_eval.adapters.base import Encoder
from rice_eval.datasets.base import IGNORE
from rice_eval.environment import launched

__all__ = [
    "PixelHead",
    "Precision",
    "count_over_processes",
    "features_of",
    "join_processes",
    "pixel_loss",
    "shared",
    "sum_over_processes",
    "world",
]

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

_PIXELS = 1 << 23
"""Logits upsampled at once by ``pixel_loss``: 32 MB in float32."""


def world() -> tuple[int, int]:
    """``(rank, processes)``; ``(0, 1)`` without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum over all processes, in place; the value itself in a single one."""
    if world()[1] > 1:
        dist.all_reduce(value)
    return value


def count_over_processes(count: int, device: torch.device) -> int:
    """The sum of a count over all processes."""
    return int(sum_over_processes(torch.tensor(count, device=device)))


def shared(value: Any) -> Any:
    """What the first process has, for all."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def join_processes(device: torch.device) -> None:
    """Join the processes that ``torchrun`` started, if it did and they have not met yet."""
    if launched()[1] == 1 or dist.is_initialized():
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # The first process may be at work alone for long (protocols on the bank, intervals) while the others wait here.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=7))
    # A group still open at exit leaves threads behind that abort the interpreter now and then.
    atexit.register(_leave_processes)


def _leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def features_of(
    encoder: Encoder, images: Tensor, layers: Sequence[int], norm: bool, precision: Precision = "fp32"
) -> Tensor:
    """Frozen features of a batch.

    Args:
        encoder: run without gradients, under autocast unless ``precision`` is fp32.
        images: ``(B, 3, H, W)`` in [0, 1].
        layers: numbers from 1; several are concatenated, resized bilinearly to the grid of the first (mmseg's
            ``resize_concat``).
        norm: whether the final norm is applied.
        precision: of the encoder's forward; the head runs in float32 always.

    Returns:
        ``(B, D, h, w)`` float32.
    """
    with torch.autocast(encoder.device.type, _AUTOCAST.get(precision), enabled=precision != "fp32"):
        tokens = encoder.encode(images, layers, norm)
    maps = []
    for layer in sorted(tokens.patches):
        h, w = tokens.grids[layer]
        # Cloned: tensors made in inference mode can't be saved for a backward pass.
        maps.append(tokens.patches[layer].float().clone().transpose(1, 2).reshape(len(images), -1, h, w))
    size = maps[0].shape[-2:]
    rest = [F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps[1:]]
    return torch.cat([maps[0], *rest], dim=1)


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm whose batch is that of all processes, on any device (torch's SyncBatchNorm needs a GPU).

    Its input must need no gradient: features are frozen.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D, h, w)`` to the same."""
        if not self.training or world()[1] == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        momentum = self.momentum or 0.0
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        sum_over_processes(count)
        mean = sum_over_processes(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = sum_over_processes(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)
        scaled = centred * (variance + self.eps).rsqrt()[:, None, None]
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


class PixelHead(nn.Module):
    """Channel dropout, batch norm, 1x1 convolution; the first two where asked for.

    Args:
        width: D.
        classes: C.
        norm: whether there is a batch norm (eps 1e-5, momentum 0.1, torch's and mmseg's defaults).
        dropout: share of channels dropped (``Dropout2d``), before the norm as in DINOv3's head.
        init: ``normal`` draws the weights from N(0, 0.01) with a bias of 0 (mmseg, DINOv3); ``uniform`` is torch's default for
            a linear layer.
        seed: of the draw.
    """

    def __init__(
        self, width: int, classes: int, norm: bool, dropout: float, init: Literal["normal", "uniform"], seed: int
    ) -> None:
        super().__init__()
        self.norm = _BatchNorm(width) if norm else None
        self.dropout = dropout
        self.conv = nn.Conv2d(width, classes, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            if init == "normal":
                self.conv.weight.normal_(0, 0.01, generator=generator)
                nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
            else:
                bound = width**-0.5
                self.conv.weight.uniform_(-bound, bound, generator=generator)
                self.conv.bias.uniform_(-bound, bound, generator=generator)  # type: ignore[union-attr]

    def forward(self, features: Tensor, seeds: Sequence[int] = ()) -> Tensor:
        """Logits.

        Args:
            features: ``(B, D, h, w)``.
            seeds: in training with dropout, a seed an image, so that an image's mask depends on nothing else.

        Returns:
            ``(B, C, h, w)``.
        """
        if self.training and self.dropout:
            keep = 1 - self.dropout
            masks = [torch.rand(features.shape[1], generator=torch.Generator().manual_seed(s)) < keep for s in seeds]
            features = features * (torch.stack(masks).to(features) / keep)[:, :, None, None]
        if self.norm is not None:
            features = self.norm(features)
        out: Tensor = self.conv(features)
        return out


def pixel_loss(logits: Tensor, labels: Tensor, average_ignored: bool, backward: bool = True) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits, over all processes' images.

    Upsampling and loss run in pieces with their gradients, so memory does not grow with the batch.

    Args:
        logits: ``(B, C, h, w)``.
        labels: ``(B, H, W)``, ``IGNORE`` where nothing counts.
        average_ignored: ignored pixels count as zeros in the mean (mmseg's and DINOv3's default); else the mean runs over
            labelled pixels.
        backward: whether gradients flow back into ``logits``; in several processes their sum over processes is that of the
            returned loss.

    Returns:
        The loss, a scalar.
    """
    pixels = torch.tensor(float(labels.numel() if average_ignored else int((labels != IGNORE).sum())))
    pixels = sum_over_processes(pixels.to(logits.device)).clamp(min=1.0)
    # With the classes of a pixel side by side all four steps are about three times faster on a CPU. A clone, since a view of one
    # image or one class passes for either memory format.
    leaf = logits.detach().clone(memory_format=torch.channels_last).requires_grad_(backward)
    total = torch.zeros((), device=logits.device)
    at_once = max(1, _PIXELS // (logits.shape[1] * labels.shape[1] * labels.shape[2]))
    for start in range(0, len(logits), at_once):
        part = slice(start, start + at_once)
        grown = F.interpolate(leaf[part], size=tuple(labels.shape[1:]), mode="bilinear", align_corners=False)
        rows = grown.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
        loss = F.cross_entropy(rows, labels[part].reshape(-1), ignore_index=IGNORE, reduction="sum") / pixels
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if backward and leaf.grad is not None:
        logits.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return sum_over_processes(total)
