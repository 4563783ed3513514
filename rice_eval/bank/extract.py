"""A source of tokens: one split at one view, read from the bank where it is there and made once where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from rice_eval.adapters.base import Encoder, EncoderFacts
from rice_eval.bank.key import BankKey
from rice_eval.bank.ledger import Ledger
from rice_eval.bank.passes import OnePass, Progress
from rice_eval.bank.prefetch import ordered_map
from rice_eval.bank.reader import Reader
from rice_eval.bank.request import TYPICAL_SIZE, bank_key, tokens_bytes
from rice_eval.bank.shard import MappedShard, PackedImage
from rice_eval.bank.source import Consumer
from rice_eval.bank.store import Bank
from rice_eval.datasets.base import Dataset
from rice_eval.errors import BankError, DataError, PlanError, UsageError
from rice_eval.views import Frame

__all__ = ["Source", "SourceFacts", "SourceView", "open_source"]


@dataclass(frozen=True)
class SourceFacts:
    """A source in numbers: its split, how many images it has, how many are in the bank, bytes an image comes to."""

    encoder: str
    dataset: str
    split: str
    images: int
    present: int
    bytes_per_image: float


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
    compiled: bool = False,
    on_bad_image: str = "stop",
    store: bool = True,
    progress: Progress | None = None,
) -> Source:
    """A lazy source of tokens; nothing is decoded or pushed through the encoder before someone asks for tokens.

    Args:
        encoder_loader: called once, and only if an image has to be pushed through the encoder.
        facts: of the same encoder.
        dataset: one split; its methods must stand being called from several threads.
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
        compiled: the loader gives an encoder whose blocks are compiled (part of the key).
        on_bad_image: ``stop`` ends with the image's name, ``skip`` leaves unreadable images out, counted and listed.
        store: False keeps nothing; an entry of the bank that is complete is read all the same.
        progress: ``progress(label, total)`` opens a bar and returns its ``advance``.

    Raises:
        UsageError, PlanError: a view, layer or flag that can't be.
    """
    if on_bad_image not in ("stop", "skip"):
        raise UsageError(f"--on-bad-image={on_bad_image} is not known", "choose stop or skip")
    key = bank_key(facts, dataset, view, layers, norm, dtype, autocast, compiled)
    report: Progress = progress or (lambda label, total: lambda n: None)
    ledger = Ledger(facts, dataset, key, bank, store and bank is not None, on_bad_image == "skip")
    one_pass = OnePass(
        ledger,
        encoder_loader,
        dataset,
        label=f"{facts.name} {dataset.name}/{dataset.split}",
        batch_size=batch_size,
        workers=workers,
        device=torch.device(device),
        progress=report,
    )
    return Source(facts, dataset, key, ledger, one_pass, report)


class Source:
    """Tokens of one split at one view, shared by every job that wants them (see ``TokenSource``); made by ``open_source``."""

    def __init__(
        self,
        facts: EncoderFacts,
        dataset: Dataset,
        key: BankKey,
        ledger: Ledger,
        one_pass: OnePass,
        progress: Progress,
    ) -> None:
        self.wanted = key
        self._facts, self._dataset = facts, dataset
        self._ledger, self._pass, self._progress = ledger, one_pass, progress

    # ---- what records ask for

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the tokens, counted from 1."""
        return self.wanted.layers

    @property
    def forwards(self) -> int:
        """Images this source pushed through the encoder; 0 from a warm bank."""
        return self._pass.forwards

    @property
    def seconds(self) -> float:
        """Wall clock of its passes, decoding and storing included."""
        return self._pass.seconds

    @property
    def notes(self) -> tuple[str, ...]:
        """What a record must say: batches halved, damaged shards redone, a damaged manifest."""
        return tuple(self._ledger.notes)

    @property
    def key(self) -> str | None:
        """Key of the bank entry that is read and filled; None where nothing is stored."""
        return self._ledger.plan.key.digest if self._ledger.entry is not None else None

    @property
    def bytes(self) -> int:
        """Bytes of the entry's shards on disk; 0 where nothing is stored."""
        return self._ledger.plan.bytes if self._ledger.entry is not None else 0

    @property
    def images_per_second(self) -> float | None:
        """Rate of the passes made by this source; None where there was none."""
        return self.forwards / self.seconds if self.forwards and self.seconds > 0 else None

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the images left out so far, by ``on_bad_image="skip"``."""
        return tuple(self._ledger.skipped[i][0] for i in sorted(self._ledger.skipped))

    @property
    def indices(self) -> tuple[int, ...]:
        """The dataset's indices that have tokens.

        Where bad images are skipped this takes the pass to know, and makes it if the bank can keep it.
        """
        if self._ledger.skip_bad and self._ledger.entry is not None:
            self.extract()
        return tuple(i for i in range(len(self._dataset)) if i not in self._ledger.skipped)

    @property
    def complete(self) -> bool:
        """Whether the bank holds every shard, by its manifest."""
        return self._ledger.entry is not None and not self._ledger.missing()

    @property
    def missing(self) -> tuple[int, ...]:
        """Numbers of the shards that are missing."""
        return tuple(self._ledger.missing())

    def images_of(self, shard: int) -> int:
        """How many images of the split belong to a shard."""
        return len(self._ledger.plan.indices(shard))

    def stored_in(self, shard: int) -> int:
        """How many images a finished shard has tokens of; 0 where it is missing."""
        facts = self._ledger.plan.shards.get(shard)
        return facts.images if facts is not None else 0

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the view's first frame on the first image that can be decoded."""
        return self._ledger.view.frames(*self._sizes(1)[0])[0].size

    @property
    def frames_per_image(self) -> float:
        """Frames of ``frame_size`` that come to as many pixels as the view cuts of an image, over 32 images spread over the split."""
        height, width = self.frame_size
        sizes = self._sizes(32)
        pixels = sum(f.size[0] * f.size[1] for size in sizes for f in self._ledger.view.frames(*size))
        return pixels / (height * width * len(sizes))

    @property
    def tokens_per_image(self) -> float:
        """Patch tokens an image at the deepest layer, over 32 images spread over the split."""
        stride = self._facts.strides[self.layers[-1] - 1]
        frames = [self._ledger.view.frames(*size) for size in self._sizes(32)]
        counts = [sum((f.size[0] // stride) * (f.size[1] // stride) for f in each) for each in frames]
        return sum(counts) / len(counts)

    def describe(self) -> SourceFacts:
        """What a plan prints; reads sizes of at most 32 images."""
        sizes = self._sizes(32)
        plan = self._ledger.plan
        missing = sum(len(plan.indices(n)) for n in self._ledger.missing())
        return SourceFacts(
            self._facts.name,
            self._dataset.name,
            self._dataset.split,
            plan.images,
            plan.images - missing,
            sum(tokens_bytes(self._facts, plan.key, size) for size in sizes) / len(sizes),
        )

    def _sizes(self, count: int) -> list[tuple[int, int]]:
        """Heights and widths of some images, spread over the split; of a typical one where none can be decoded."""
        sizes = []
        total = len(self._dataset)
        for k in range(min(count, total)):
            try:
                sizes.append(self._dataset.size(k * total // min(count, total)))
            except DataError:  # reported by the pass, by name
                continue
        return sizes or [TYPICAL_SIZE]

    # ---- reading

    def mapped(self, number: int) -> MappedShard:
        """A finished shard; made first, or made anew, where it is missing or damaged.

        Raises:
            BankError: it is damaged again right after it was made.
        """
        for _ in range(3):
            found = self._ledger.open(number)
            if found is not None:
                return found
            self.extract((number,))
        raise BankError(f"shard {number} of bank entry {self.key}: damaged again after it was redone", "check the disk")

    def extract(self, shards: Sequence[int] | None = None, *, wait: bool = True) -> None:
        """Make what is missing of the entry.

        Args:
            shards: only these; all by default.
            wait: wait for shards that other processes are at; False returns as soon as there is nothing left to claim.
        """
        if self._ledger.entry is None:
            raise BankError(
                "tokens are not stored in this run, and this protocol reads them several times", "leave out --no-store"
            )
        for _ in self._pass.run(shards, (), wait=wait):
            pass

    def reader(self) -> Reader:
        """The finished entry; extracts what is missing first.

        Raises:
            BankError: nothing is stored here, so that there is nothing to read at random.
        """
        self.extract()
        return Reader(self.layers, self.indices, self._ledger.plan.shard_images, self.mapped, self._ledger.view)

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
                consumer.consume(image.tokens(self._ledger.view, layers, target))

        cursor = 0
        for content, prepared in self._pass.run(None, consumers):
            cursor = self._replay(cursor, content.number, consumers, show)
            if content.number == cursor:
                targets = {p.index: p.targets for p in prepared}
                for image in content.images:
                    show(image, targets[image.index])
                cursor += 1
        self._replay(cursor, self._ledger.plan.count, consumers, show, whole=True)

    def _replay(
        self,
        start: int,
        stop: int,
        consumers: Sequence[Consumer],
        show: Callable[[PackedImage, Sequence[object]], None],
        whole: bool = False,
    ) -> int:
        """Show stored shards from ``start`` up to ``stop`` or the first that is not there yet; returns where it ended.

        ``whole`` goes on to ``stop`` in any case: what was pruned since the pass is made again, not left out.
        """
        if self._ledger.entry is None or start >= stop:
            return start
        missing = set() if whole else set(self._ledger.missing())
        end = next((n for n in range(start, stop) if n in missing), stop)
        if end == start:
            return start

        def work() -> Iterator[tuple[int, int, tuple[Frame, ...]]]:
            for number in range(start, end):
                shard = self.mapped(number)
                for index in shard.indices:
                    yield number, index, shard.frames(index)

        def annotate(item: tuple[int, int, tuple[Frame, ...]]) -> tuple[int, int, tuple[object, ...]]:
            number, index, frames = item
            return number, index, tuple(c.annotate(self._dataset, index, frames) for c in consumers)

        advance = self._progress(f"read {self._facts.name} {self._dataset.name}/{self._dataset.split}", end - start)
        workers = self._pass.workers
        for number, group in groupby(ordered_map(annotate, work(), workers, 4 * max(1, workers)), lambda w: w[0]):
            shard = self.mapped(number)
            for _, index, targets in group:
                show(shard.image(index), targets)
            advance(1)
        return end


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
