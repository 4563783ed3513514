"""What a run will cost before it starts: passes, tokens, bytes, hours, and what is in the bank already.

Rates are measured, never looked up: ``measure_rate`` pushes blank frames through the encoder for some seconds. The sizing
table scales one measured rate to other encoders by their arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rice_eval.adapters.base import Encoder
from rice_eval.bank.extract import Source
from rice_eval.bank.forward import is_out_of_memory
from rice_eval.errors import BankError

__all__ = [
    "SIZING_ENCODERS",
    "SIZING_SETS",
    "PassEstimate",
    "SizingRow",
    "VitShape",
    "estimate_pass",
    "flop_rate",
    "measure_rate",
    "sizing_table",
    "vit_flops",
]


@dataclass(frozen=True)
class PassEstimate:
    """One pass of a plan.

    Attributes:
        encoder, dataset, split, view: what goes through what, in which geometry.
        layers: stored, counted from 1.
        dtype: storage type.
        images: of the split.
        present: images whose tokens are in the bank already.
        tokens: patch tokens of the whole split at the deepest layer.
        bytes: of the whole split in the bank.
        present_bytes: of what is there.
        seconds: for what is missing, at the measured rate; None where no rate was given.
    """

    encoder: str
    dataset: str
    split: str
    view: str
    layers: tuple[int, ...]
    dtype: str
    images: int
    present: int
    tokens: int
    bytes: int
    present_bytes: int
    seconds: float | None


def estimate_pass(source: Source, images_per_second: float | None = None) -> PassEstimate:
    """The cost of a source that has not been read yet; sizes come from at most 32 images, spread over the split."""
    facts = source.describe()
    images, present = facts.images, facts.present
    return PassEstimate(
        encoder=facts.encoder,
        dataset=facts.dataset,
        split=facts.split,
        view=source.wanted.view,
        layers=source.layers,
        dtype=source.wanted.dtype,
        images=images,
        present=present,
        tokens=round(source.tokens_per_image * images),
        bytes=round(facts.bytes_per_image * images),
        present_bytes=source.bytes,
        seconds=(images - present) / images_per_second if images_per_second else None,
    )


def measure_rate(
    encoder: Encoder,
    frame: tuple[int, int],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    autocast: str | None = None,
    seconds: float = 3.0,
) -> float:
    """Frames a second through the encoder alone: blank frames, one batch to warm up, then as many as fit the time.

    A batch that does not fit the memory is halved, as in a pass.

    Args:
        encoder: in eval mode.
        frame: height and width in pixels.
        batch_size: frames a forward.
        device: where it runs.
        autocast: ``bf16``, ``fp16`` or None.
        seconds: how long to measure, at least one batch.

    Raises:
        BankError: no memory for a single frame.
    """
    where = torch.device(device)
    encoder.to(where)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(autocast or "", torch.bfloat16)

    def forward(images: torch.Tensor) -> None:
        with torch.autocast(where.type, dtype=kind, enabled=autocast is not None):
            encoder.encode(images, (-1,))
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    while True:
        try:
            images = torch.zeros(batch_size, 3, *frame, device=where)
            forward(images)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise BankError(
                    f"no memory on {where} for one frame of {frame[0]} x {frame[1]} px through encoder '{encoder.name}'",
                    "use a smaller view or another device",
                ) from error
            batch_size //= 2
    done, start = 0, time.perf_counter()
    while not done or time.perf_counter() - start < seconds:
        forward(images)
        done += batch_size
    return done / (time.perf_counter() - start)


@dataclass(frozen=True)
class VitShape:
    """A Vision Transformer by its numbers; ``side`` pixels give 32 x 32 patches."""

    name: str
    depth: int
    width: int
    patch: int
    side: int


SIZING_ENCODERS = (
    # Depth and width: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), table 1.
    VitShape("ViT-B/16", 12, 768, 16, 512),
    VitShape("ViT-L/14", 24, 1024, 14, 448),
    VitShape("ViT-H/14", 32, 1280, 14, 448),
)

SIZING_SETS = {
    # Train and val images: SceneParsing challenge 2016; COCO 2017; LVIS v1.
    "ADE20K": 20_210 + 2_000,
    "COCO": 118_287 + 5_000,
    "LVIS": 100_170 + 19_809,
}


def vit_flops(shape: VitShape) -> float:
    """Floating-point operations of one image's forward (a multiply-add counts two).

    A block costs 24 D^2 a token for its matrices (4 D^2 weights of attention, 8 D^2 of the MLP) and 4 N D for attention itself.
    """
    tokens = (shape.side // shape.patch) ** 2 + 1
    block = tokens * (24 * shape.width**2 + 4 * tokens * shape.width)
    return float(shape.depth * block + 2 * 3 * shape.patch**2 * shape.width * tokens)


def flop_rate(images_per_second: float, flops: int) -> float:
    """Operations a second that a measured rate comes to."""
    return images_per_second * flops


@dataclass(frozen=True)
class SizingRow:
    """One encoder on one dataset: what a pass over train and val stores, and how long it takes on 1, 8, … devices."""

    encoder: str
    dataset: str
    images: int
    tokens: int
    bytes_fp16: int
    bytes_int8: int
    hours: dict[int, float]


def sizing_table(operations_per_second: float, devices: Sequence[int] = (1, 8, 64), layers: int = 4) -> list[SizingRow]:
    """Passes of ViT-B, L and H over ADE20K, COCO and LVIS at 1024 tokens an image.

    Args:
        operations_per_second: of one device through a real encoder, from ``flop_rate`` of a measured rate.
        devices: counts to work out.
        layers: layers stored.

    Shards are independent, so hours fall with the devices as long as decoding and disks keep up.
    """
    rows = []
    for shape in SIZING_ENCODERS:
        tokens = (shape.side // shape.patch) ** 2
        for name, images in SIZING_SETS.items():
            seconds = images * vit_flops(shape) / operations_per_second
            stored = images * tokens * layers
            rows.append(
                SizingRow(
                    shape.name,
                    name,
                    images,
                    images * tokens,
                    stored * shape.width * 2,
                    stored * (shape.width + 4),
                    {n: seconds / 3600 / n for n in devices},
                )
            )
    return rows
