"""The one pass: claim a shard, decode, forward, hand over, store; shards that other processes are at are theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from filelock import FileLock

from rice_eval.adapters.base import Encoder
from rice_eval.bank.forward import Forward, Prepared
from rice_eval.bank.ledger import Ledger
from rice_eval.bank.manifest import ShardFacts
from rice_eval.bank.prefetch import ordered_map
from rice_eval.bank.shard import ShardContent, write_shard
from rice_eval.bank.source import Consumer
from rice_eval.bank.store import wait_a_little
from rice_eval.datasets.base import Dataset
from rice_eval.errors import BankError, DataError

__all__ = ["OnePass", "Progress"]

Progress = Callable[[str, int], Callable[[int], None]]


class OnePass:
    """Makes the missing shards of one request.

    Args:
        ledger: what is missing, and where it goes.
        loader: called once, when the first image has to be pushed through the encoder.
        dataset: the split.
        label: what the progress bar says.
        batch_size: frames a forward.
        workers: decoding threads; None takes one a core, 4 at most on a CPU, whose cores the encoder needs.
        device: of the forward.
        progress: opens a bar.

    Attributes:
        forwards: images pushed through the encoder.
        seconds: wall clock, decoding and storing included; loading the encoder and what consumers do are not.
    """

    def __init__(
        self,
        ledger: Ledger,
        loader: Callable[[], Encoder],
        dataset: Dataset,
        *,
        label: str,
        batch_size: int,
        workers: int | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.forwards = 0
        self.seconds = 0.0
        self._ledger, self._loader, self._dataset = ledger, loader, dataset
        self._label, self._progress = label, progress
        self._batch_size, self._device = batch_size, device
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers if workers is not None else (cores if device.type == "cuda" else min(4, cores))
        self._forward: Forward | None = None

    def run(
        self, shards: Sequence[int] | None, consumers: Sequence[Consumer], *, wait: bool = True
    ) -> Iterator[tuple[ShardContent, list[Prepared]]]:
        """Make missing shards, in ascending order as far as other processes allow, and hand each over once it is whole.

        Args:
            shards: only these; all by default.
            consumers: their ``annotate`` is called for every image, in the workers.
            wait: wait for shards that other processes are at; False ends when there is nothing left to claim.

        Yields:
            the shard, and its images' names and targets without their pixels.
        """
        ledger = self._ledger
        wanted = set(range(ledger.plan.count)) if shards is None else set(shards)
        todo = [n for n in ledger.missing() if n in wanted]
        if not todo:
            ledger.tidy()
            return
        advance = self._progress(self._label, sum(len(ledger.plan.indices(n)) for n in todo))
        tries = 0
        while todo:
            mine = set()
            for content, prepared in self._sweep(todo, consumers):
                mine.add(content.number)
                advance(len(ledger.plan.indices(content.number)))
                yield content, prepared
            if ledger.entry is None:
                return
            missing = set(ledger.missing())
            elsewhere = [n for n in todo if n not in missing and n not in mine]
            advance(sum(len(ledger.plan.indices(n)) for n in elsewhere))
            todo = [n for n in todo if n in missing]
            if todo and not wait:
                return
            tries = 0 if mine else tries + 1
            if todo and not mine:
                wait_a_little(tries)
        ledger.tidy()

    def _sweep(
        self, todo: Sequence[int], consumers: Sequence[Consumer]
    ) -> Iterator[tuple[ShardContent, list[Prepared]]]:
        """One walk over the missing shards that nobody else is at."""
        locks: dict[int, FileLock] = {}
        writer = ThreadPoolExecutor(1, thread_name_prefix="bank") if self._ledger.entry is not None else None
        writing: Future[None] | None = None
        started, paused = time.perf_counter(), 0.0
        try:
            images = ordered_map(
                lambda work: self._prepare(*work, consumers),
                self._claims(todo, locks),
                self.workers,
                max(2 * self._batch_size, 4 * self.workers),
            )
            for number, group in groupby(images, lambda p: p.shard):
                pause = time.perf_counter()
                forward = self._forwarder()
                paused += time.perf_counter() - pause
                seen: list[Prepared] = []
                packed, bad = forward.shard(_remember(group, seen))
                self.forwards += len(packed)
                content = ShardContent(number, packed, [(p.index, p.name, str(p.reason)) for p in bad])
                for skipped in content.skipped:
                    self._ledger.skip(*skipped)
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
            self._ledger.refresh()

    def _claims(self, todo: Sequence[int], locks: dict[int, FileLock]) -> Iterator[tuple[int, int]]:
        """Shard and index of every image to decode, of shards claimed one after the other just before their turn."""
        ledger = self._ledger
        for number in todo:
            if ledger.entry is not None:
                lock = ledger.create().claim(number)
                if lock is None:
                    continue
                locks[number] = lock
                ledger.refresh()
                if number not in ledger.missing():  # someone finished it before we had the lock
                    lock.release()
                    continue
            for index in ledger.plan.indices(number):
                yield number, index

    def _prepare(self, shard: int, index: int, consumers: Sequence[Consumer]) -> Prepared:
        """Decode one image and cut its windows; runs in a worker."""
        name = self._dataset.image_id(index)
        try:
            image = self._dataset.image(index)
        except DataError as error:
            if not self._ledger.skip_bad:
                raise
            return Prepared(shard, index, name, reason=error.what)
        cut = self._ledger.view.apply(image, self._ledger.plan.key.fill)
        frames = tuple(frame for _, frame in cut)
        windows = tuple(np.ascontiguousarray(pixels.transpose(2, 0, 1)) for pixels, _ in cut)
        targets = tuple(c.annotate(self._dataset, index, frames) for c in consumers)
        return Prepared(shard, index, name, (int(image.shape[0]), int(image.shape[1])), windows, frames, targets)

    def _forwarder(self) -> Forward:
        if self._forward is None:
            key = self._ledger.plan.key
            encoder = self._loader()
            if encoder.fingerprint != key.encoder:
                raise BankError(
                    f"encoder '{encoder.name}' has the fingerprint {encoder.fingerprint[:12]} after loading, not "
                    f"{key.encoder[:12]} as announced",
                    "give the facts of the encoder that is loaded",
                )
            self._forward = Forward(encoder, key, self._batch_size, self._device, self._ledger.note)
        return self._forward

    def _save(self, content: ShardContent, lock: FileLock) -> None:
        """Write a shard, enter it in the manifest and free its lock; runs in the writer's thread."""
        entry = self._ledger.entry
        assert entry is not None
        try:
            metadata = {"key": entry.folder.name, "shard": str(content.number)}
            with entry.writing(content.number) as temporary:
                sha256, size = write_shard(temporary, content, metadata)
            facts = ShardFacts(sha256, size, len(content.images), tuple(content.skipped))
            entry.add(content.number, facts)
            entry.trust(content.number, facts)
        finally:
            lock.release()


def _remember(images: Iterator[Prepared], seen: list[Prepared]) -> Iterator[Prepared]:
    """Pass images on and keep what comes after the forward: targets, not pixels."""
    for image in images:
        seen.append(replace(image, windows=()))
        yield image
