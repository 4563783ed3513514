"""A tiny encoder and a tiny dataset: what they give can be computed by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rice_eval.adapters.base import Encoder, EncoderFacts, Tokens
from rice_eval.bank.extract import Source, open_source
from rice_eval.bank.source import ImageTokens
from rice_eval.bank.store import Bank
from rice_eval.datasets.base import Dataset, Image
from rice_eval.errors import DataError
from rice_eval.views import Frame

PATCH = 4


def facts(layers: int = 3, width: int = 8, sha256: str = "e" * 64) -> EncoderFacts:
    return EncoderFacts(
        name="fake",
        family="fake",
        arch="fake",
        params=1,
        patch=PATCH,
        resolution=16,
        layers=layers,
        widths=(width,) * layers,
        strides=(PATCH,) * layers,
        mean=(0.5, 0.5, 0.5),
        std=(1.0, 1.0, 1.0),
        sha256=sha256,
    )


class FakeEncoder(Encoder):
    """Token = mean RGB of the patch through one fixed matrix a layer; counts what goes through it."""

    def __init__(self, spoil: Callable[[Tensor, dict[int, Tensor]], None] | None = None, **shape: Any) -> None:
        self.facts = facts(**shape)
        width = self.facts.widths[0]
        generator = torch.Generator().manual_seed(0)
        self.matrices = [torch.randn(3, width, generator=generator) for _ in range(self.facts.layers)]
        self.spoil = spoil
        self.batches: list[int] = []

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        b, _, height, width = images.shape
        self.batches.append(b)
        h, w = height // PATCH, width // PATCH
        means = images.view(b, 3, h, PATCH, w, PATCH).mean(dim=(3, 5)).flatten(2).transpose(1, 2)
        patches = {layer: means @ self.matrices[layer - 1] for layer in layers}
        if self.spoil is not None:
            self.spoil(images, patches)
        return Tokens(patches, dict.fromkeys(layers, (h, w)), cls=patches[max(layers)].mean(dim=1))

    def to(self, device: torch.device) -> FakeEncoder:
        return self


class FakeDataset(Dataset):
    """Random images of a few sizes; some may be unreadable."""

    name = "fake"
    split = "train"
    classes = ("a", "b")
    provides = frozenset({"semantic"})

    def __init__(self, n: int = 20, sizes: Sequence[tuple[int, int]] = ((16, 16),), bad: Sequence[int] = ()) -> None:
        self.n, self.sizes, self.bad = n, tuple(sizes), set(bad)

    def __len__(self) -> int:
        return self.n

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.n} {self.sizes}".encode()).hexdigest()

    def image_id(self, index: int) -> str:
        return f"img-{index}"

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index % len(self.sizes)]

    def image(self, index: int) -> Image:
        if index in self.bad:
            raise DataError(f"img-{index}: can't be decoded", "replace the file")
        return np.random.default_rng(index).integers(0, 256, (*self.size(index), 3), dtype=np.uint8)


class Collect:
    """A consumer that keeps everything."""

    def __init__(self) -> None:
        self.seen: list[ImageTokens] = []

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> Any:
        return dataset.image_id(index), len(frames)

    def consume(self, tokens: ImageTokens) -> None:
        self.seen.append(tokens)


def source(
    bank: Bank | Path | None,
    dataset: Dataset | None = None,
    encoder: FakeEncoder | None = None,
    *,
    view: str = "square=16",
    layers: Sequence[int] = (1, 3),
    dtype: str = "fp16",
    **kwargs: Any,
) -> Source:
    """A source over fakes with shards of four images."""
    if isinstance(bank, Path):
        bank = Bank(bank, shard_images=4)
    chosen = encoder or FakeEncoder()
    kwargs.setdefault("batch_size", 3)
    kwargs.setdefault("workers", 2)
    data = FakeDataset() if dataset is None else dataset
    return open_source(lambda: chosen, chosen.facts, data, view, layers, True, dtype, bank, **kwargs)


def files(root: Path) -> dict[str, bytes]:
    """Every file under a bank, by its path inside; the manifests' bytes too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
