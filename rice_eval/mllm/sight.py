"""The half of a multimodal model that sees: images to tiles to an encoder's tokens."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rice_eval.adapters.base import Encoder, fingerprint_of
from rice_eval.errors import PlanError
from rice_eval.mllm.conversation import Encoded, Picture
from rice_eval.mllm.tiling import Tiles, Tiling

__all__ = ["Sight"]

#: Images whose tokens are kept: benchmarks ask several questions of one image, one after the other.
KEPT = 32

#: Tiles that go through the encoder together.
AT_ONCE = 16


class Sight:
    """An encoder at a layer, and the tiling before it.

    Args:
        encoder: any of the registry.
        layers: block numbers from 1, or negative from the last; tokens of several are concatenated in this order.
        norm: whether the final norm is applied.
        tiling: how images are cut.

    Attributes:
        tuned: whether the encoder is being trained: tokens carry a graph and are not kept.

    Raises:
        PlanError: a layer the encoder has not.
    """

    def __init__(self, encoder: Encoder, layers: tuple[int, ...], norm: bool, tiling: Tiling) -> None:
        if not layers:
            raise PlanError("no layer of the encoder is asked for", "give at least one")
        self.encoder, self.norm, self.tiling = encoder, norm, tiling
        self.layers = tuple(encoder.resolve_layers([layer])[0] for layer in layers)
        self.tuned = False
        self._untuned = ""  # fingerprint of the encoder before any training
        self._kept: OrderedDict[str, Encoded] = OrderedDict()

    @property
    def width(self) -> int:
        """D of the tokens, all layers together."""
        return sum(self.encoder.facts.widths[layer - 1] for layer in self.layers)

    def check_divides(self) -> None:
        """A tile's side must be whole patches.

        Raises:
            PlanError: it is not.
        """
        side = self.tiling.square_side
        if side is not None:
            self.encoder.check_size(side, side)

    def changed(self, by: str) -> None:
        """The encoder was trained: its fingerprint is another one, its facts say so, and no kept token is its own."""
        facts = self.encoder.facts
        self._untuned = self._untuned or facts.sha256
        sha256 = fingerprint_of(self.encoder.tunable().state_dict(), {"untuned": self._untuned})
        self.encoder.facts = replace(facts, sha256=sha256, notes=(*facts.notes, f"tuned by {by}"))
        self._kept.clear()

    def facts(self) -> dict[str, Any]:
        """All that changes a token, as JSON values."""
        facts = self.encoder.facts
        told: dict[str, Any] = {
            "encoder": {"name": facts.name, "sha256": facts.sha256, "arch": facts.arch, "params": facts.params},
            "layers": list(self.layers),
            "norm": self.norm,
            "tiles": self.tiling.facts(),
        }
        side, step = self.tiling.square_side, self.encoder.multiple
        if side is not None and side % step:
            told["pixels_unseen"] = (
                side % step
            )  # at the right and bottom, as in the published model (SigLIP: 384 = 27 * 14 + 6)
        return told

    def encode(self, images: Sequence[Picture], alone: Sequence[bool] | None = None) -> list[Encoded]:
        """Tokens of images, each equal image once; those already encoded pass through.

        Args:
            images: of any number of requests.
            alone: for each, whether its request has no other image; by default all stand alone.

        Raises:
            DataError: an image that can't be decoded or cut.
        """
        alone = [True] * len(images) if alone is None else alone
        keys = [None if isinstance(i, Encoded) else f"{single} {_key(i)}" for i, single in zip(images, alone)]
        new: dict[str, Tiles] = {}
        for key, image, single in zip(keys, images, alone):
            if key is None or isinstance(image, Encoded) or key in new or (key in self._kept and not self.tuned):
                continue
            new[key] = self.tiling.cut(image, self.encoder.multiple, self.encoder.facts.mean, single)
        found = {key: self._kept[key] for key in keys if key is not None and key not in new}
        found.update(zip(new, self._forward(list(new.values()))))
        if not self.tuned:
            for key, encoded in found.items():
                self._kept[key] = encoded
                self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return [image if isinstance(image, Encoded) else found[str(key)] for key, image in zip(keys, images)]

    def _forward(self, images: list[Tiles]) -> list[Encoded]:
        """Tiles of one size go through the encoder together, in portions."""
        step = self.encoder.multiple
        flat = [
            (n, tile[:, : tile.shape[1] // step * step, : tile.shape[2] // step * step])
            for n, t in enumerate(images)
            for tile in t.pixels
        ]
        tokens: list[list[Tensor]] = [[] for _ in images]
        grids: list[tuple[int, int]] = [(0, 0)] * len(images)
        start = 0
        while start < len(flat):
            stop = start + 1
            while stop < min(len(flat), start + AT_ONCE) and flat[stop][1].shape == flat[start][1].shape:
                stop += 1
            said, grid = self._tokens(torch.stack([tile for _, tile in flat[start:stop]]))
            for (n, _), row in zip(flat[start:stop], said):
                tokens[n].append(row)
                grids[n] = grid
            start = stop
        return [Encoded(torch.stack(rows), grid, t.size) for rows, grid, t in zip(tokens, grids, images)]

    def _tokens(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``(T, 3, h, w)`` -> ``(T, N, D)`` and the grid; with a graph where the encoder is tuned."""
        see = self.encoder.encode_with_grad if self.tuned else self.encoder.encode
        said = see(pixels, self.layers, self.norm)
        grid = said.grids[self.layers[0]]
        if any(said.grids[layer] != grid for layer in self.layers):
            raise PlanError(
                f"encoder '{self.encoder.name}' has other grids at layers {', '.join(map(str, self.layers))}",
                "choose layers of one grid",
            )
        return torch.cat([said.patches[layer] for layer in self.layers], dim=-1), grid


def _key(image: Image.Image) -> str:
    digest = hashlib.sha256(f"{image.mode} {image.size} {getattr(image, 'filename', '')}".encode())
    try:
        digest.update(image.tobytes())
        if image.mode == "P":
            digest.update(bytes(image.getpalette() or ()))
    except Exception:  # what can't be decoded is refused with its name when it is cut
        return f"unreadable {id(image)}"
    return digest.hexdigest()
