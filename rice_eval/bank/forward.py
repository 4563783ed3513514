"""From decoded images to a packed shard: batches of equal frames, one forward at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rice_eval.adapters.base import Encoder
from rice_eval.bank.arena import Arena
from rice_eval.bank.key import BankKey
from rice_eval.bank.shard import CAST, PackedImage, pack
from rice_eval.errors import BankError
from rice_eval.views import Frame

__all__ = ["Forward", "Prepared", "is_out_of_memory"]

Pixels = NDArray[np.uint8]
_OUT_OF_MEMORY: tuple[type[BaseException], ...] = (
    MemoryError,
    getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError),
)


@dataclass(frozen=True)
class Prepared:
    """A decoded image: its view's windows as ``(3, h, w)`` uint8, and what each consumer needs of its annotations.

    ``reason`` says why an unreadable image has no windows; None for a good one.
    """

    shard: int
    index: int
    name: str
    size: tuple[int, int] = (0, 0)
    windows: tuple[Pixels, ...] = ()
    frames: tuple[Frame, ...] = ()
    targets: tuple[object, ...] = ()
    reason: str | None = None


@dataclass
class _Slot:
    """Where the tokens of one frame go."""

    image: Prepared
    frame: int


@dataclass
class _Parts:
    """The frames of one image as they come in."""

    values: dict[int, list[Tensor | None]] = field(default_factory=dict)
    scales: dict[int, list[Tensor | None]] = field(default_factory=dict)
    grids: dict[int, list[tuple[int, int] | None]] = field(default_factory=dict)
    cls: list[Tensor | None] = field(default_factory=list)


@dataclass
class _Launched:
    """A batch whose results are on their way to the CPU."""

    slots: Sequence[_Slot]
    values: dict[int, Tensor]
    scales: dict[int, Tensor]
    grids: dict[int, tuple[int, int]]
    cls: Tensor | None
    sound: Tensor
    ready: torch.cuda.Event | None


class Forward:
    """Runs one encoder over frames.

    Args:
        encoder: in eval mode; moved to ``device``.
        key: layers, norm, storage type and autocast's type.
        batch_size: frames a forward, at most; halved when memory runs out, and kept so.
        note: called with a sentence for the record.
    """

    def __init__(
        self, encoder: Encoder, key: BankKey, batch_size: int, device: torch.device, note: Callable[[str], None]
    ) -> None:
        self._encoder = encoder.to(device)
        self._key = key
        self._device = device
        self._note = note
        self._arena = Arena()
        self.batch_size = max(1, batch_size)

    def shard(self, images: Iterable[Prepared]) -> tuple[list[PackedImage], list[Prepared]]:
        """Tokens of the images of one shard.

        Frames are grouped by size in the order of the images, and no batch crosses the shard, so that its bytes depend neither
        on where an earlier run ended nor on which process makes it.

        Args:
            images: in the dataset's order.

        Returns:
            the packed images, in the same order, and the unreadable ones.

        Raises:
            BankError: tokens that are NaN or Inf, or no memory for a single frame.
        """
        self._arena = Arena()
        order: list[Prepared] = []
        bad: list[Prepared] = []
        parts: dict[int, _Parts] = {}
        waiting: dict[tuple[int, int], list[_Slot]] = {}
        launched: _Launched | None = None
        for image in images:
            if image.reason is not None:
                bad.append(image)
                continue
            order.append(replace(image, windows=()))  # pixels live no longer than their forward
            parts[image.index] = _Parts()
            for number, frame in enumerate(image.frames):
                group = waiting.setdefault(frame.size, [])
                group.append(_Slot(image, number))
                while len(group) >= self.batch_size:
                    batch, group[:] = group[: self.batch_size], group[self.batch_size :]
                    launched = self._run(batch, launched, parts)
        for group in waiting.values():
            for start in range(0, len(group), self.batch_size):
                launched = self._run(group[start : start + self.batch_size], launched, parts)
        self._collect(launched, parts)
        return [_packed(image, parts.pop(image.index)) for image in order], bad

    def _run(self, batch: Sequence[_Slot], before: _Launched | None, parts: dict[int, _Parts]) -> _Launched | None:
        """Launch a batch, then collect the one before it, which the device has finished meanwhile."""
        latest = before
        queue = [batch]
        while queue:
            slots = queue.pop(0)
            try:
                launched = self._launch(slots)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._collect(latest, parts)
                latest = None
                self._shrink(len(slots), error)
                half = (len(slots) + 1) // 2
                queue[:0] = [slots[:half], slots[half:]]
                continue
            self._collect(latest, parts)
            latest = launched
        return latest

    def _shrink(self, size: int, error: BaseException) -> None:
        if size == 1:
            raise BankError(
                f"no memory on {self._device} for one image through encoder '{self._encoder.name}'",
                "use a smaller view or another device",
            ) from error
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = max(1, size // 2)
        if smaller < self.batch_size:
            self._note(f"memory ran out on {self._device} at {self.batch_size} images a batch; went on with {smaller}")
            self.batch_size = smaller

    def _autocast(self) -> AbstractContextManager[object]:
        kind = self._key.compute.partition("+")[0]
        if kind == "weights":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=CAST["bf16" if kind == "bf16" else "fp16"])

    def _launch(self, slots: Sequence[_Slot]) -> _Launched:
        cuda = self._device.type == "cuda"
        pixels = torch.from_numpy(np.stack([s.image.windows[s.frame] for s in slots]))
        if cuda:
            pixels = pixels.pin_memory()
        images = pixels.to(self._device, non_blocking=cuda).float().div_(255)
        with self._autocast():
            tokens = self._encoder.encode(images, self._key.layers, self._key.norm)
        values, scales, sums = {}, {}, []
        for layer in self._key.layers:
            h, w = tokens.grids[layer]
            if tokens.patches[layer].shape[:2] != (len(slots), h * w):
                shape = tuple(tokens.patches[layer].shape)
                raise BankError(
                    f"encoder '{self._encoder.name}', layer {layer}: tokens {shape} for a grid of {h} x {w}"
                )
            packed, scale = pack(tokens.patches[layer], self._key.dtype)
            # A sum is NaN or Inf if any value is; the few false alarms are looked at again.
            sums.append((packed if scale is None else scale).flatten(1).sum(dim=1, dtype=torch.float32))
            values[layer] = packed
            if scale is not None:
                scales[layer] = scale
        cls = tokens.cls
        if cls is not None:
            cls, _ = pack(cls, "fp16" if self._key.dtype == "int8" else self._key.dtype)
            sums.append(cls.sum(dim=1, dtype=torch.float32))
        sound = torch.stack(sums).isfinite()
        values = {layer: self._home(v) for layer, v in values.items()}
        scales = {layer: self._home(v) for layer, v in scales.items()}
        home_cls, home_sound = None if cls is None else self._home(cls), self._home(sound)
        ready = None
        if cuda:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        grids = {layer: (int(tokens.grids[layer][0]), int(tokens.grids[layer][1])) for layer in self._key.layers}
        return _Launched(slots, values, scales, grids, home_cls, home_sound, ready)

    def _home(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, in memory of its shard's own; from a GPU into pinned memory, without waiting."""
        if self._device.type == "cuda":
            out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return out.copy_(tensor, non_blocking=True)
        return self._arena.take(tensor.shape, tensor.dtype).copy_(tensor)

    def _collect(self, launched: _Launched | None, parts: dict[int, _Parts]) -> None:
        if launched is None:
            return
        if launched.ready is not None:
            launched.ready.synchronize()
        if not bool(launched.sound.all()):
            self._alarm(launched)
        for row, slot in enumerate(launched.slots):
            part, count = parts[slot.image.index], len(slot.image.frames)
            for layer, values in launched.values.items():
                part.values.setdefault(layer, [None] * count)[slot.frame] = values[row]
                part.grids.setdefault(layer, [None] * count)[slot.frame] = launched.grids[layer]
            for layer, scales in launched.scales.items():
                part.scales.setdefault(layer, [None] * count)[slot.frame] = scales[row]
            if launched.cls is not None:
                part.cls = part.cls or [None] * count
                part.cls[slot.frame] = launched.cls[row]

    def _alarm(self, launched: _Launched) -> None:
        """Look closely at a batch whose sums are NaN or Inf; BankError where a token is, not where large tokens only add up to it."""
        for slot in launched.slots:
            self._examine(slot)
        # By itself every frame is sound; what counts is what would be stored.
        stored = [(f"layer {layer}", t) for layer, t in {**launched.values, **launched.scales}.items()]
        if launched.cls is not None:
            stored.append((f"the class token of layer {max(self._key.layers)}", launched.cls))
        for name, tokens in stored:
            for slot, row in zip(launched.slots, tokens):
                if not bool(row.isfinite().all()):
                    raise BankError(
                        f"encoder '{self._encoder.name}', image '{slot.image.name}', {name}: the tokens are NaN or Inf "
                        f"in a batch of {len(launched.slots)}, and sound alone",
                        "run with --batch-size 1, and check the encoder",
                    )

    def _examine(self, slot: _Slot) -> None:
        """Look closely at one frame of a batch that gave the alarm; BankError names what is wrong."""
        images = torch.from_numpy(slot.image.windows[slot.frame])[None].to(self._device).float().div_(255)
        with self._autocast():
            tokens = self._encoder.encode(images, self._key.layers, self._key.norm)
        named = [(f"layer {layer}", tokens.patches[layer]) for layer in self._key.layers]
        if tokens.cls is not None:
            named.append((f"the class token of layer {max(self._key.layers)}", tokens.cls))
        for name, raw in named:
            where = f"encoder '{self._encoder.name}', image '{slot.image.name}', {name}"
            if not bool(raw.isfinite().all()):
                kind = "NaN" if bool(raw.isnan().any()) else "Inf"
                fix = "check the weights" + (
                    "" if self._key.compute.startswith("weights") else ", or run without --autocast"
                )
                raise BankError(f"{where}: the tokens are {kind}", fix)
            packed, scale = pack(raw, self._key.dtype)
            if not bool((packed if scale is None else scale).isfinite().all()):
                peak = float(raw.abs().max())
                raise BankError(
                    f"{where}: a token of {peak:.3g} does not fit {self._key.dtype}", "store tokens as bf16 or fp32"
                )


def _packed(image: Prepared, part: _Parts) -> PackedImage:
    def full(lists: dict[int, list[Tensor | None]]) -> dict[int, tuple[Tensor, ...]]:
        return {layer: tuple(t for t in found if t is not None) for layer, found in lists.items()}

    cls = [c for c in part.cls if c is not None]
    return PackedImage(
        index=image.index,
        size=image.size,
        grids={layer: tuple(g for g in found if g is not None) for layer, found in part.grids.items()},
        values=full(part.values),
        scales=full(part.scales),
        cls=torch.stack(cls) if cls else None,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward failed because memory, of the device or of the machine, ran out."""
    if isinstance(error, _OUT_OF_MEMORY):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "out of memory" in text.lower()
