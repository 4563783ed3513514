"""The one pass: tokens of one split at one view, read from the bank where they are there and made once where they are not."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from rice_eval.adapters.base import Encoder, EncoderFacts
from rice_eval.bank.forward import Forward, Prepared
from rice_eval.bank.key import COMPUTES, BankKey, check_dtype
from rice_eval.bank.prefetch import ordered_map
from rice_eval.bank.reader import Reader
from rice_eval.bank.shard import MappedShard, PackedImage, ShardContent, write_shard
from rice_eval.bank.source import Consumer
from rice_eval.bank.store import Bank, Entry, Manifest, ShardFacts, wait_a_little
from rice_eval.datasets.base import Dataset
from rice_eval.errors import BankError, DataError, PlanError, UsageError
from rice_eval.views import Frame, View

__all__ = ["Source", "SourceView", "bank_key", "open_source", "shard_length"]

Progress = Callable[[str, int], Callable[[int], None]]

TYPICAL_SIZE = (480, 640)
"""Height and width of COCO's usual image: what sizes are guessed from where a view depends on the image."""

_SHARD_BYTES = 128 << 20
"""What a shard aims at: small enough that a kill loses little and one shard fits any memory, large enough for a disk."""


def bank_key(
    facts: EncoderFacts,
    dataset: Dataset,
    view: str,
    layers: Sequence[int],
    norm: bool,
    dtype: str,
    autocast: str | None = None,
) -> BankKey:
    """The key of a request; ``view`` is resolved for the encoder's patch and ``layers`` may count from the end.

    Raises:
        UsageError: a view, storage type or autocast type that does not exist.
        PlanError: a layer that does not exist.
    """
    numbers = sorted({facts.layers + 1 + n if n < 0 else n for n in layers})
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= facts.layers:
        raise PlanError(
            f"encoder '{facts.name}' has layers 1 to {facts.layers}, not {list(layers)}", f"ask for 1..{facts.layers}"
        )
    compute = autocast or "weights"
    if compute not in COMPUTES:
        raise UsageError(f"autocast to '{autocast}' is not known", "choose bf16 or fp16, or leave it out")
    red, green, blue = (min(255, max(0, round(255 * m))) for m in facts.mean)
    return BankKey(
        encoder=facts.sha256,
        dataset=dataset.fingerprint,
        view=str(View.parse(view).resolve(facts.patch)),
        layers=tuple(numbers),
        norm=norm,
        dtype=check_dtype(dtype),
        compute=compute,
        fill=(red, green, blue),
    )


def open_source(
    encoder_loader: Callable[[], Encoder],
    facts: EncoderFacts,
    dataset: Dataset,
    view: str,
    layers: Sequence[int],
    norm: bool,
    dtype: str,
    bank: Bank | None,
    *,
    batch_size: int = 8,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    autocast: str | None = None,
    on_bad_image: str = "stop",
    store: bool = True,
    progress: Progress | None = None,
) -> Source:
    """A lazy source of tokens; nothing is decoded, loaded or read before someone asks for tokens.

    Args:
        encoder_loader: called once, and only if an image has to be pushed through the encoder.
        facts: of the same encoder.
        dataset: one split; its ``image`` must stand being called from several threads.
        view: canonical or not; sides counted in patches are resolved.
        layers: block numbers, negative from the last.
        norm: whether the encoder's final norm is applied.
        dtype: how tokens are stored: ``fp16``, ``bf16``, ``fp32`` or ``int8``. Consumers that ride on a pass see them as
            stored, so that a cold and a warm run agree.
        bank: where tokens are kept; None keeps nothing.
        batch_size: frames a forward.
        workers: decoding threads; None takes one a core, 4 at most on a CPU, whose cores the encoder needs.
        device: torch device of the forward.
        autocast: ``bf16`` or ``fp16`` runs the forward under autocast (part of the key); None as the weights are.
        on_bad_image: ``stop`` ends with the image's name, ``skip`` leaves unreadable images out, counted and listed.
        store: False keeps nothing; an entry of the bank that is complete is read all the same.
        progress: ``progress(label, total)`` opens a bar and returns its ``advance``.

    Raises:
        UsageError, PlanError: a view, layer or flag that can't be.
    """
    if on_bad_image not in ("stop", "skip"):
        raise UsageError(f"--on-bad-image={on_bad_image} is not known", "choose stop or skip")
    key = bank_key(facts, dataset, view, layers, norm, dtype, autocast)
    return Source(
        encoder_loader,
        facts,
        dataset,
        key,
        bank,
        batch_size=batch_size,
        workers=workers,
        device=torch.device(device),
        skip_bad=on_bad_image == "skip",
        store=store and bank is not None,
        progress=progress or (lambda label, total: lambda n: None),
    )


def shard_length(facts: EncoderFacts, key: BankKey, images: int) -> int:
    """Images a shard: a power of two from 16 to 64 that comes near 128 MiB, fewer for small splits so that there are about eight.

    It depends on nothing but the request, so that every process and every machine cuts a split in the same way.
    """
    size = tokens_bytes(facts, key, TYPICAL_SIZE)
    fitting = 2 ** int(math.log2(max(1.0, _SHARD_BYTES / max(1, size))))
    eighth = 2 ** int(math.log2(max(1.0, images / 8)))
    return int(min(max(16, min(64, fitting)), max(8, eighth)))


def tokens_bytes(facts: EncoderFacts, key: BankKey, size: tuple[int, int]) -> int:
    """Bytes of an image of ``(H, W)`` in the bank, class token and grids left out."""
    each = {"fp16": 2, "bf16": 2, "fp32": 4, "int8": 1}[key.dtype]
    total = 0
    for frame in View.parse(key.view).frames(*size):
        for layer in key.layers:
            stride, width = facts.strides[layer - 1], facts.widths[layer - 1]
            count = (frame.size[0] // stride) * (frame.size[1] // stride)
            total += count * (width * each + (4 if key.dtype == "int8" else 0))
    return total


class Source:
    """Tokens of one split at one view, shared by every job that wants them (see ``TokenSource``).

    Attributes:
        forwards: images this source pushed through the encoder.
        seconds: wall clock of its passes, decoding and storing included.
        notes: what a record must say: batches halved, damaged shards redone, a damaged manifest.
    """

    def __init__(
        self,
        loader: Callable[[], Encoder],
        facts: EncoderFacts,
        dataset: Dataset,
        key: BankKey,
        bank: Bank | None,
        *,
        batch_size: int,
        workers: int | None,
        device: torch.device,
        skip_bad: bool,
        store: bool,
        progress: Progress,
    ) -> None:
        self.forwards = 0
        self.seconds = 0.0
        self.notes: list[str] = []
        self.wanted = key
        self._loader, self._facts, self._dataset = loader, facts, dataset
        self._bank, self._store = bank, store
        self._batch_size, self._device = batch_size, device
        self._skip_bad, self._progress = skip_bad, progress
        self._view = View.parse(key.view)
        cores = _cores()
        self._workers = workers if workers is not None else (cores if device.type == "cuda" else min(4, cores))
        self._forward: Forward | None = None
        self._entry: Entry | None = None
        self._manifest: Manifest | None = None
        self._skipped: dict[int, tuple[str, str]] = {}
        self._mapped: dict[int, MappedShard] = {}
        if bank is not None and len(dataset):
            self._attach(bank)

    # ---- what records ask for

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the tokens, counted from 1."""
        return self.wanted.layers

    @property
    def key(self) -> str | None:
        """Key of the bank entry that is read and filled; None where nothing is stored."""
        return self._plan().key.digest if self._entry is not None else None

    @property
    def bytes(self) -> int:
        """Bytes of the entry's shards on disk; 0 where nothing is stored."""
        return self._plan().bytes if self._entry is not None else 0

    @property
    def images_per_second(self) -> float | None:
        """Rate of the passes made by this source; None where there was none."""
        return self.forwards / self.seconds if self.forwards and self.seconds > 0 else None

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the images left out so far, by ``on_bad_image="skip"``."""
        self._learn_skipped()
        return tuple(self._skipped[i][0] for i in sorted(self._skipped))

    @property
    def indices(self) -> tuple[int, ...]:
        """The dataset's indices that have tokens.

        Where bad images are skipped this takes the pass to know, and makes it if the bank can keep it.
        """
        if self._skip_bad and self._entry is not None:
            self.extract()
        self._learn_skipped()
        return tuple(i for i in range(len(self._dataset)) if i not in self._skipped)

    @property
    def complete(self) -> bool:
        """Whether the bank holds every shard, by its manifest."""
        return self._entry is not None and not self._missing()

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the view's first frame on the first image (on a typical one where it can't be decoded)."""
        return self._view.frames(*self._first_size())[0].size

    @property
    def tokens_per_image(self) -> float:
        """Patch tokens an image at the deepest layer, over the first 32 images that can be decoded."""
        stride = self._facts.strides[self.layers[-1] - 1]
        sizes = self._sizes(32)
        counts = [sum((f.size[0] // stride) * (f.size[1] // stride) for f in self._view.frames(*s)) for s in sizes]
        return sum(counts) / len(counts)

    def _first_size(self) -> tuple[int, int]:
        return self._sizes(1)[0]

    def _sizes(self, count: int) -> list[tuple[int, int]]:
        sizes = []
        for index in range(min(count, len(self._dataset))):
            try:
                sizes.append(self._dataset.size(index))
            except DataError:  # reported by the pass, by name
                continue
        return sizes or [TYPICAL_SIZE]

    # ---- the bank

    def _attach(self, bank: Bank) -> None:
        """Choose the entry that serves the request; it is made on disk only when the first shard is written."""
        entry = bank.best(self.wanted, len(self._dataset))
        manifest = entry.manifest()
        if not self._store:
            sound = manifest is not None and all(
                entry.check(n, f, checksum=False) is None for n, f in manifest.shards.items()
            )
            if manifest is None or not manifest.complete or not sound:
                return
        if manifest is None and (entry.folder / "manifest.json").exists():
            self._note(
                f"the manifest of bank entry {entry.folder.name[:12]} was damaged; all of its shards were redone"
            )
        self._entry, self._manifest = entry, manifest
        for number, facts in sorted(manifest.shards.items()) if manifest is not None else ():
            wrong = entry.check(number, facts, checksum=False)
            if wrong is not None:
                self._redo(number, wrong)
        entry.touch()

    def _plan(self) -> Manifest:
        """The manifest as last read, or as it will be."""
        if self._manifest is None:
            n = len(self._dataset)
            length = self._bank.shard_images if self._bank is not None and self._entry is not None else None
            about = {"encoder": self._facts.name, "dataset": self._dataset.name, "split": self._dataset.split}
            return Manifest(self.wanted, about, n, length or shard_length(self._facts, self.wanted, n), {})
        return self._manifest

    def _refresh(self) -> Manifest:
        if self._entry is not None:
            self._manifest = self._entry.manifest()
        return self._plan()

    def _missing(self) -> list[int]:
        """Shards to make. One that lacks images counts as missing where bad images are to stop the run."""
        plan = self._plan()
        done = {n for n, s in plan.shards.items() if self._skip_bad or not s.skipped} if self._entry else set()
        return [n for n in range(plan.count) if n not in done]

    def _redo(self, number: int, wrong: str) -> None:
        """Take a damaged shard out of the entry; the record says so."""
        assert self._entry is not None
        if not self._store:
            raise BankError(
                f"shard {number} of bank entry {self._entry.folder.name[:12]}: {wrong}",
                "run with storing on to redo it",
            )
        self._mapped.pop(number, None)
        self._entry.drop(number)
        self._refresh()
        self._note(f"shard {number} of bank entry {self._entry.folder.name[:12]} was redone: {wrong}")

    def _learn_skipped(self) -> None:
        for facts in self._plan().shards.values():
            for index, name, reason in facts.skipped:
                if self._skip_bad:
                    self._skipped[index] = (name, reason)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # ---- reading

    def mapped(self, number: int) -> MappedShard:
        """A finished shard; checked against its checksum once a process, and made anew where it is damaged."""
        found = self._mapped.pop(number, None)
        if found is None:
            assert self._entry is not None
            for _ in range(3):
                facts = self._plan().shards.get(number)
                wrong = self._entry.check(number, facts) if facts is not None else None
                if facts is not None and wrong is None:
                    found = MappedShard(self._entry.shard(number), self._view)
                    break
                if wrong is not None:
                    self._redo(number, wrong)
                self.extract((number,))
            else:
                raise BankError(f"{self._entry.shard(number)}: damaged again after it was redone", "check the disk")
        self._mapped[number] = found
        while len(self._mapped) > 16:  # a map keeps a file descriptor
            self._mapped.pop(next(iter(self._mapped)))
        return found

    def reader(self) -> Reader:
        """The finished entry; extracts what is missing first.

        Raises:
            BankError: nothing is stored here, so that there is nothing to read at random.
        """
        if self._entry is None:
            raise BankError(
                "tokens are not stored in this run, and this protocol reads them more than once", "run with storing on"
            )
        self.extract()
        return Reader(self.layers, self.indices, self._plan().shard_images, self.mapped, self._view)

    def select(self, layers: Sequence[int]) -> SourceView:
        """The same source for a job that reads some of its layers."""
        return SourceView(self, tuple(sorted(layers)))

    def consume(self, *consumers: Consumer) -> None:
        """Show every image to every consumer once, in order: from the bank if it is there, else on the pass that fills it."""
        self.consume_layers(self.layers, consumers)

    def consume_layers(self, layers: tuple[int, ...], consumers: Sequence[Consumer]) -> None:
        """``consume`` with some of the layers."""

        def show(image: PackedImage, targets: Sequence[object]) -> None:
            for consumer, target in zip(consumers, targets):
                consumer.consume(image.tokens(self._view, layers, target))

        cursor = 0
        for content, prepared in self._pass(None, consumers):
            cursor = self._replay(cursor, content.number, consumers, show)
            if content.number == cursor:
                targets = {p.index: p.targets for p in prepared}
                for image in content.images:
                    show(image, targets[image.index])
                cursor += 1
        self._replay(cursor, self._plan().count, consumers, show)

    def _replay(
        self,
        start: int,
        stop: int,
        consumers: Sequence[Consumer],
        show: Callable[[PackedImage, Sequence[object]], None],
    ) -> int:
        """Show the stored shards from ``start`` on, up to ``stop`` or the first that is not there yet; returns where it ended."""
        if self._entry is None or start >= stop:
            return start
        missing = set(self._missing())
        ready = []
        for number in range(start, stop):
            if number in missing:
                break
            ready.append(number)

        def annotate(work: tuple[int, int, tuple[Frame, ...]]) -> tuple[int, int, tuple[object, ...]]:
            number, index, frames = work
            return number, index, tuple(c.annotate(self._dataset, index, frames) for c in consumers)

        work = (
            (number, index, shard.frames(index))
            for number in ready
            for shard in (self.mapped(number),)
            for index in shard.indices
        )
        advance = self._progress(f"read {self._label}", len(ready)) if ready else None
        for number, group in groupby(
            ordered_map(annotate, work, self._workers, 4 * max(1, self._workers)), lambda w: w[0]
        ):
            shard = self.mapped(number)
            for _, index, targets in group:
                show(shard.image(index), targets)
            if advance is not None:
                advance(1)
        return start + len(ready)

    # ---- the pass

    @property
    def _label(self) -> str:
        return f"{self._facts.name} {self._dataset.name}/{self._dataset.split}"

    def extract(self, shards: Sequence[int] | None = None, *, wait: bool = True) -> None:
        """Make what is missing of the entry.

        Args:
            shards: only these; all by default.
            wait: wait for shards that other processes are at; False returns as soon as there is nothing left to claim.
        """
        if self._entry is None:
            raise BankError("tokens are not stored in this run", "run with storing on")
        for _ in self._pass(shards, (), wait=wait):
            pass

    def _pass(
        self, shards: Sequence[int] | None, consumers: Sequence[Consumer], *, wait: bool = True
    ) -> Iterator[tuple[ShardContent, list[Prepared]]]:
        """Make missing shards, in ascending order as far as other processes allow, and hand each over once it is whole."""
        if not len(self._dataset):
            return
        wanted = set(range(self._plan().count)) if shards is None else set(shards)
        todo = [n for n in self._missing() if n in wanted]
        if not todo:
            return
        advance = self._progress(self._label, sum(len(self._plan().indices(n)) for n in todo))
        tries = 0
        while todo:
            mine = set()
            for content, prepared in self._sweep(todo, consumers):
                mine.add(content.number)
                advance(len(self._plan().indices(content.number)))
                yield content, prepared
            if self._entry is None:
                return
            missing = set(self._missing())
            elsewhere = [n for n in todo if n not in missing and n not in mine]
            advance(sum(len(self._plan().indices(n)) for n in elsewhere))
            todo = [n for n in todo if n in missing]
            tries = 0 if mine else tries + 1
            if todo and not wait:
                return
            if todo and not mine:
                wait_a_little(tries)
        if self._entry is not None and self._plan().complete:
            self._entry.tidy()

    def _sweep(
        self, todo: Sequence[int], consumers: Sequence[Consumer]
    ) -> Iterator[tuple[ShardContent, list[Prepared]]]:
        """One walk over the missing shards that nobody else is at."""
        locks: dict[int, FileLock] = {}
        writer = ThreadPoolExecutor(1, thread_name_prefix="bank") if self._entry is not None else None
        writing: Future[None] | None = None
        started = time.perf_counter()
        paused = 0.0
        try:
            images = ordered_map(
                lambda work: self._prepare(*work, consumers),
                self._claims(todo, locks),
                self._workers,
                max(2 * self._batch_size, 4 * self._workers),
            )
            for number, group in groupby(images, lambda p: p.shard):
                seen: list[Prepared] = []
                pause = time.perf_counter()
                forward = self._forwarder()
                paused += time.perf_counter() - pause
                packed, bad = forward.shard(_remember(group, seen))
                self.forwards += len(packed)
                content = ShardContent(number, packed, [(p.index, p.name, str(p.reason)) for p in bad])
                for index, name, reason in content.skipped:
                    self._skipped[index] = (name, reason)
                if writer is not None:
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(self._save, content, locks[number])
                pause = time.perf_counter()
                yield content, seen
                paused += time.perf_counter() - pause
            if writing is not None:
                writing.result()
        finally:
            if writer is not None:
                writer.shutdown(wait=True)
            for lock in locks.values():
                lock.release()
            self.seconds += time.perf_counter() - started - paused
            self._refresh()

    def _claims(self, todo: Sequence[int], locks: dict[int, FileLock]) -> Iterator[tuple[int, int]]:
        """Shard and index of every image to decode, of shards claimed one after the other just before their turn."""
        for number in todo:
            if self._entry is not None:
                if self._manifest is None:
                    self._manifest = self._entry.create(self._plan())
                lock = self._entry.claim(number)
                if lock is None:
                    continue
                locks[number] = lock
                self._refresh()
                if number not in self._missing():  # someone finished it before we had the lock
                    lock.release()
                    continue
            for index in self._plan().indices(number):
                yield number, index

    def _prepare(self, shard: int, index: int, consumers: Sequence[Consumer]) -> Prepared:
        """Decode one image and cut its windows; runs in a worker."""
        name = self._dataset.image_id(index)
        try:
            image = self._dataset.image(index)
        except DataError as error:
            if not self._skip_bad:
                raise
            return Prepared(shard, index, name, reason=error.what)
        cut = self._view.apply(image, self._plan().key.fill)
        frames = tuple(frame for _, frame in cut)
        windows = tuple(np.ascontiguousarray(pixels.transpose(2, 0, 1)) for pixels, _ in cut)
        targets = tuple(c.annotate(self._dataset, index, frames) for c in consumers)
        return Prepared(shard, index, name, (int(image.shape[0]), int(image.shape[1])), windows, frames, targets)

    def _forwarder(self) -> Forward:
        if self._forward is None:
            encoder = self._loader()
            if encoder.fingerprint != self.wanted.encoder:
                raise BankError(
                    f"encoder '{encoder.name}' has the fingerprint {encoder.fingerprint[:12]} after loading, not "
                    f"{self.wanted.encoder[:12]} as announced",
                    "give the facts of the encoder that is loaded",
                )
            self._forward = Forward(encoder, self._plan().key, self._batch_size, self._device, self._note)
        return self._forward

    def _save(self, content: ShardContent, lock: FileLock) -> None:
        """Write a shard, enter it in the manifest and free its lock; runs in the writer's thread."""
        assert self._entry is not None
        try:
            metadata = {"format": str(self.wanted.format), "key": self._entry.folder.name, "shard": str(content.number)}
            with self._entry.writing(content.number) as temporary:
                sha256, size = write_shard(temporary, content, metadata)
            facts = ShardFacts(sha256, size, len(content.images), tuple(content.skipped))
            self._entry.add(content.number, facts)
            self._entry.trust(content.number, facts)
        finally:
            lock.release()


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _remember(images: Iterator[Prepared], seen: list[Prepared]) -> Iterator[Prepared]:
    """Pass images on and keep what comes after the forward: targets, not pixels."""
    for image in images:
        seen.append(replace(image, windows=()))
        yield image


class SourceView:
    """Some layers of a ``Source``; passes and counts are the source's."""

    def __init__(self, source: Source, layers: tuple[int, ...]) -> None:
        lacking = set(layers) - set(source.layers)
        if lacking or not layers:
            raise PlanError(
                f"layers {sorted(lacking)} are not among the source's {list(source.layers)}", "open it with them"
            )
        self.source = source
        self.layers = layers

    @property
    def forwards(self) -> int:
        """Images the source pushed through the encoder."""
        return self.source.forwards

    @property
    def indices(self) -> tuple[int, ...]:
        """The dataset's indices that have tokens."""
        return self.source.indices

    def consume(self, *consumers: Consumer) -> None:
        """As ``Source.consume``, with these layers alone."""
        self.source.consume_layers(self.layers, consumers)

    def reader(self) -> Reader:
        """As ``Source.reader``, with these layers alone."""
        return self.source.reader().select(self.layers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)
