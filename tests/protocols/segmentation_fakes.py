"""In-memory stand-ins for a dataset, an encoder's facts and a bank, for protocols' tests."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rice_eval.adapters.base import Encoder, EncoderFacts, Tokens
from rice_eval.bank.source import Consumer, ImageTokens
from rice_eval.datasets.base import IGNORE, Dataset
from rice_eval.protocols.base import Context
from rice_eval.views import View

COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220], [230, 220, 60], [200, 60, 210]], dtype=np.uint8)


class FakeDataset(Dataset):
    """Images made of rectangles, a noisy colour a class; labels with an ignored border."""

    provides = frozenset({"semantic"})
    name = "fake"

    def __init__(
        self, split: str, count: int, seed: int, classes: int = 4, sizes: Sequence[tuple[int, int]] = ((28, 42),)
    ) -> None:
        self.split, self.classes = split, tuple(f"class {k}" for k in range(classes))
        rng = np.random.default_rng(seed)
        self._items: list[tuple[NDArray[np.uint8], NDArray[np.int64]]] = []
        for k in range(count):
            h, w = sizes[k % len(sizes)]
            labels = np.zeros((h, w), dtype=np.int64)
            for _ in range(6):
                y, x = rng.integers(0, h - 4), rng.integers(0, w - 4)
                labels[y : y + rng.integers(4, h), x : x + rng.integers(4, w)] = rng.integers(0, classes)
            image = COLOURS[labels].astype(np.int64) + rng.integers(-40, 40, (h, w, 3))
            labels[0], labels[:, -1] = IGNORE, IGNORE
            self._items.append((image.clip(0, 255).astype(np.uint8), labels))

    def __len__(self) -> int:
        return len(self._items)

    @property
    def fingerprint(self) -> str:
        return f"{self.split}-{len(self)}"

    def image_id(self, index: int) -> str:
        return f"{self.split}{index:03d}"

    def image(self, index: int) -> NDArray[np.uint8]:
        return self._items[index][0]

    def semantic(self, index: int) -> NDArray[np.int64]:
        return self._items[index][1]


class FakeEncoder(Encoder):
    """Two 'layers' of a fixed random projection of patches, the second wider and twice as coarse if ``pyramid``."""

    def __init__(self, pyramid: bool = False, patch: int = 7) -> None:
        generator = torch.Generator().manual_seed(3)
        self.kernels = [
            torch.randn(d, 3, p, p, generator=generator) / p for d, p in ((6, patch), (9, patch * (1 + pyramid)))
        ]
        self.facts = EncoderFacts(
            name="fake", family="fake", arch="fake", params=0, patch=patch * (1 + pyramid), resolution=28, layers=2,
            widths=(6, 9), strides=(patch, patch * (1 + pyramid)), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
        )  # fmt: skip
        self.images_seen = 0

    def _encode(self, images: torch.Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        self.images_seen += len(images)
        x = (images - 0.5) / 0.25
        patches, grids = {}, {}
        for layer in layers:
            kernel = self.kernels[layer - 1]
            out = torch.nn.functional.conv2d(x, kernel, stride=kernel.shape[-1])
            out = torch.cat([out[:, :3], out[:, 3:].tanh()], dim=1)
            if norm:
                out = out / (1 + out.abs().mean(dim=1, keepdim=True))
            grids[layer] = (out.shape[2], out.shape[3])
            patches[layer] = out.flatten(2).transpose(1, 2)
        return Tokens(patches, grids)

    def to(self, device: torch.device) -> FakeEncoder:
        return self


class FakeSource:
    """Tokens computed at once and kept; a source and its reader in one."""

    def __init__(self, encoder: Encoder, dataset: Dataset, view: str, layers: tuple[int, ...], norm: bool) -> None:
        self.forwards, self.layers, self._dataset = 0, layers, dataset
        self._items: dict[int, ImageTokens] = {}
        for index in range(len(dataset)):
            patches: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
            grids: dict[int, list[tuple[int, int]]] = {layer: [] for layer in layers}
            frames = []
            for window, frame in View.parse(view).apply(dataset.image(index)):
                image = torch.from_numpy(window.copy()).permute(2, 0, 1)[None].float() / 255
                tokens = encoder.encode(image, layers, norm)
                frames.append(frame)
                for layer in layers:
                    patches[layer].append(tokens.patches[layer][0].half().clone())
                    grids[layer].append(tokens.grids[layer])
            self._items[index] = ImageTokens(
                index, tuple(frames), {k: tuple(v) for k, v in patches.items()}, {k: tuple(v) for k, v in grids.items()}
            )

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(self._items)

    def consume(self, *consumers: Consumer) -> None:
        copies = [pickle.loads(pickle.dumps(c)) for c in consumers]  # annotate runs in another process
        for index, item in self._items.items():
            for consumer, copy in zip(consumers, copies):
                target = copy.annotate(self._dataset, index, item.frames)
                consumer.consume(ImageTokens(index, item.frames, item.patches, item.grids, item.cls, target))

    def reader(self) -> FakeSource:
        return self

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> ImageTokens:
        return self._items[index]

    def __iter__(self) -> Iterator[ImageTokens]:
        return iter(self._items.values())


def no_progress(label: str, total: int) -> Callable[[int], None]:
    return lambda n: None


def context_of(protocol: Any, train: Dataset, test: Dataset, encoder: Encoder | None = None, **options: Any) -> Context:
    """A context whose sources run ``encoder`` on the spot."""
    encoder = encoder or FakeEncoder()
    splits = {"train": train, "test": test}
    made: dict[tuple[str, str], FakeSource] = {}

    def tokens(split: str, view: str) -> FakeSource:
        if (split, view) not in made:
            made[split, view] = FakeSource(encoder, splits[split], view, protocol.layers(encoder.facts), protocol.norm)
        return made[split, view]

    return Context(
        facts=encoder.facts, encoder=lambda: encoder, train=train, test=test, tokens=tokens,
        device=torch.device("cpu"), progress=no_progress, **options,
    )  # fmt: skip
