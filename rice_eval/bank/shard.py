"""One shard: the tokens of some consecutive images of a split, in a safetensors file.

Tensors of a shard with n images that have F frames and T tokens a layer in all (raster order, frame after frame):

==================  ===========  ==========================================================================
``images``          (n,) I64     index in the dataset
``sizes``           (n, 2) I64   height and width of the image; the view's frames follow from them
``grid.L``          (F, 2) I64   ``(h, w)`` of every frame at layer L
``scale.L``         (T,) F32     int8 alone: a token is its row times this
``cls``             (F, D)       class token of the deepest layer, where the encoder has one; F16 in an int8 bank
``tokens.L``        (T, D)       F16, BF16, F32 or I8
==================  ===========  ==========================================================================

The writer streams the file and hashes it on the way, so that nothing is held twice or read back. Wide types come first, which keeps
every tensor aligned for a memory map.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rice_eval.bank.key import TokenDtype
from rice_eval.bank.source import ImageTokens
from rice_eval.errors import BankError
from rice_eval.views import Frame, View

__all__ = ["CAST", "MappedShard", "PackedImage", "ShardContent", "pack", "unpack", "write_shard"]

CAST: Mapping[TokenDtype, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int8": torch.int8,
}
_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.int64: "I64",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


def pack(tokens: Tensor, dtype: TokenDtype) -> tuple[Tensor, Tensor | None]:
    """Tokens as they are stored.

    Args:
        tokens: ``(..., D)`` floats.
        dtype: how to store them.

    Returns:
        the stored values, ``(..., D)``, and for int8 the scale of each token, ``(...)`` fp32: its largest magnitude over 127,
        so that a value is off by at most half a scale. A token of zeros has the scale 0.
    """
    if dtype != "int8":
        packed = torch.empty(tokens.shape, dtype=CAST[dtype], device=tokens.device)
        return packed.copy_(tokens), None
    wide = tokens.float()
    scale = wide.abs().amax(dim=-1) / 127
    # NaN and Inf stay visible in the scale; the division by a zero scale is avoided, not its cause hidden.
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (wide / divisor[..., None]).round_().clamp_(-127, 127).to(torch.int8), scale


def unpack(values: Tensor, scale: Tensor | None) -> Tensor:
    """``(N, D)`` stored values back to floats; the values themselves where they are floats already."""
    return values if scale is None else values.float() * scale[:, None]


@dataclass(frozen=True)
class PackedImage:
    """One image as a shard stores it: F frames a layer, each ``(N_f, D)``; ``cls`` is ``(F, D)`` or None."""

    index: int
    size: tuple[int, int]
    grids: Mapping[int, tuple[tuple[int, int], ...]]
    values: Mapping[int, tuple[Tensor, ...]]
    scales: Mapping[int, tuple[Tensor, ...]]
    cls: Tensor | None = None

    def tokens(self, view: View, layers: Iterable[int], target: Any = None) -> ImageTokens:
        """What consumers and readers get; ``cls`` is given only where the deepest of ``layers`` is the deepest stored."""
        chosen = tuple(layers)
        patches = {}
        for layer in chosen:
            scales = self.scales.get(layer) or (None,) * len(self.values[layer])
            patches[layer] = tuple(unpack(v, s) for v, s in zip(self.values[layer], scales))
        return ImageTokens(
            index=self.index,
            frames=view.frames(*self.size),
            patches=patches,
            grids={layer: self.grids[layer] for layer in chosen},
            cls=self.cls if max(chosen) == max(self.values) else None,
            target=target,
        )


@dataclass
class ShardContent:
    """A shard that has just been made, still in memory.

    Attributes:
        images: those with tokens, in the dataset's order.
        skipped: ``(index, id, reason)`` of images left out.
    """

    number: int
    images: list[PackedImage] = field(default_factory=list)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], list[Tensor]]]:
        """Name, type, shape and pieces of every tensor, wide types first."""
        images = self.images
        yield "images", torch.int64, (len(images),), [torch.tensor([i.index for i in images], dtype=torch.int64)]
        sizes = torch.tensor([i.size for i in images], dtype=torch.int64).view(-1, 2)
        yield "sizes", torch.int64, (len(images), 2), [sizes]
        if not images:
            return
        layers = sorted(images[0].values)
        for layer in layers:
            grids = torch.tensor([g for i in images for g in i.grids[layer]], dtype=torch.int64).view(-1, 2)
            yield f"grid.{layer}", torch.int64, tuple(grids.shape), [grids]
        later = []
        for layer in layers:
            pieces = [v for i in images for v in i.values[layer]]
            total, width = sum(int(p.shape[0]) for p in pieces), int(pieces[0].shape[-1])
            if images[0].scales:
                yield f"scale.{layer}", torch.float32, (total,), [s for i in images for s in i.scales[layer]]
            later.append((f"tokens.{layer}", pieces[0].dtype, (total, width), pieces))
        cls = [i.cls for i in images if i.cls is not None]
        if cls:
            yield "cls", cls[0].dtype, (sum(int(c.shape[0]) for c in cls), int(cls[0].shape[-1])), cls
        yield from later


def write_shard(path: Path, content: ShardContent, metadata: Mapping[str, str]) -> tuple[str, int]:
    """Write a shard to ``path`` and sync it to the disk.

    Args:
        path: a temporary name; the caller renames it.
        content: what to write.
        metadata: strings for the header; they must depend on nothing but the content.

    Returns:
        sha256 of the file, and its bytes.

    Raises:
        OSError: as the file system raises it.
    """
    tensors = list(content.tensors())
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, dtype, shape, _ in tensors:
        end = offset + dtype.itemsize * _count(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as handle:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            handle.write(block)
        for _, _, _, pieces in tensors:
            for piece in pieces:
                if piece.numel():
                    data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
                    digest.update(data)
                    handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest(), 8 + len(text) + offset


def _count(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


class MappedShard:
    """A shard file, memory-mapped. Tensors are views of the map: copy before changing them."""

    def __init__(self, path: Path, view: View) -> None:
        """Open ``path``.

        Raises:
            BankError: the file is missing, or is no shard.
        """
        self._view = view
        try:
            with path.open("rb") as handle:
                # A private map: pages are shared with the page cache until someone writes to them.
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            length = int.from_bytes(self._map[:8], "little")
            header: dict[str, Any] = json.loads(self._map[8 : 8 + length])
            self._start = 8 + length
            self._header = {name: entry for name, entry in header.items() if name != "__metadata__"}
            images = self._tensor("images").tolist()
            sizes = [(int(h), int(w)) for h, w in self._tensor("sizes").tolist()]
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BankError(f"{path}: not a readable shard ({error})", "run rice-eval bank verify") from error
        self.layers = tuple(sorted(int(n.partition(".")[2]) for n in self._header if n.startswith("tokens.")))
        self.indices: tuple[int, ...] = tuple(images)
        self._sizes = sizes
        self._place = {index: k for k, index in enumerate(self.indices)}
        self._frames = [0]
        for size in sizes:
            self._frames.append(self._frames[-1] + len(view.frames(*size)))
        self._grids: dict[int, list[tuple[int, int]]] = {}
        self._tokens: dict[int, list[int]] = {}
        for layer in self.layers:
            grids = [(int(h), int(w)) for h, w in self._tensor(f"grid.{layer}").tolist()]
            starts = [0]
            for h, w in grids:
                starts.append(starts[-1] + h * w)
            self._grids[layer], self._tokens[layer] = grids, starts
        self._opened = {n: self._tensor(n) for n in self._header if n.split(".")[0] in ("tokens", "scale", "cls")}

    def _tensor(self, name: str) -> Tensor:
        entry = self._header[name]
        dtype, shape, (start, end) = _TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=_count(shape), offset=self._start + start)
        return flat.view(shape)

    def __contains__(self, index: object) -> bool:
        return index in self._place

    def frames(self, index: int) -> tuple[Frame, ...]:
        """The view's frames of the image at ``index``; KeyError where the shard does not hold it."""
        return self._view.frames(*self._sizes[self._place[index]])

    def image(self, index: int) -> PackedImage:
        """The image at ``index`` of the dataset; KeyError where the shard does not hold it."""
        k = self._place[index]
        first, last = self._frames[k], self._frames[k + 1]
        grids, values, scales = {}, {}, {}
        for layer in self.layers:
            starts = self._tokens[layer]
            spans = [(starts[f], starts[f + 1]) for f in range(first, last)]
            grids[layer] = tuple(self._grids[layer][first:last])
            values[layer] = tuple(self._opened[f"tokens.{layer}"][a:b] for a, b in spans)
            scale = self._opened.get(f"scale.{layer}")
            if scale is not None:
                scales[layer] = tuple(scale[a:b] for a, b in spans)
        cls = self._opened.get("cls")
        return PackedImage(index, self._sizes[k], grids, values, scales, cls[first:last] if cls is not None else None)
