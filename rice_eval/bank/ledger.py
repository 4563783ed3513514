"""What a source knows of its entry: what is finished, what is missing, what was damaged, what was left out."""

from __future__ import annotations

from dataclasses import replace

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.key import BankKey
from rice_eval.bank.manifest import Manifest
from rice_eval.bank.request import shard_length
from rice_eval.bank.shard import MappedShard
from rice_eval.bank.store import MANIFEST, Bank, Entry
from rice_eval.datasets.base import Dataset
from rice_eval.errors import BankError
from rice_eval.views import View

__all__ = ["Ledger"]

_OPEN_MAPS = 16
"""Shards kept mapped at a time; each holds a file descriptor."""


class Ledger:
    """The state of one request against one entry of the bank.

    Args:
        facts: of the encoder.
        dataset: the split.
        key: what is asked for; the entry may hold more layers.
        bank: where entries lie, or None.
        store: whether shards may be written.
        skip_bad: whether a shard that lacks unreadable images counts as finished.

    Attributes:
        entry: the entry that serves the request; None where nothing is stored or read.
        notes: sentences for the record.
        skipped: index -> ``(name, reason)`` of images left out.
    """

    def __init__(
        self, facts: EncoderFacts, dataset: Dataset, key: BankKey, bank: Bank | None, store: bool, skip_bad: bool
    ) -> None:
        self.entry: Entry | None = None
        self.notes: list[str] = []
        self.skipped: dict[int, tuple[str, str]] = {}
        self.store, self.skip_bad = store, skip_bad
        self._manifest: Manifest | None = None
        self._mapped: dict[int, MappedShard] = {}
        self._wrong: dict[int, str] = {}
        self.view = View.parse(key.view)
        about = {"encoder": facts.name, "dataset": dataset.name, "split": dataset.split}
        count = len(dataset)
        length = (bank.shard_images if bank is not None else None) or shard_length(facts, key, count)
        self._blank = Manifest(key, about, count, length, {})
        if bank is not None and count:
            self._attach(bank)

    def _attach(self, bank: Bank) -> None:
        """Choose the entry that serves the request; it is made on disk only when the first shard is written."""
        entry = bank.best(self._blank.key, self._blank.images)
        manifest = entry.manifest()
        if manifest is not None and manifest.images != self._blank.images:
            manifest = None
        shards = sorted(manifest.shards.items()) if manifest is not None else []
        wrong = {n: w for n, f in shards if (w := entry.check(n, f, checksum=False)) is not None}
        if not self.store and (manifest is None or not manifest.complete or wrong):
            return
        if manifest is None and (entry.folder / MANIFEST).exists():
            self.note(f"the manifest of bank entry {entry.folder.name[:12]} was damaged; all of its shards were redone")
        self.entry, self._manifest, self._wrong = entry, manifest, wrong
        if manifest is not None:
            # Should the entry be pruned while it is read, it is made again as it was: more layers may be in it than were asked for.
            self._blank = replace(manifest, shards={})
        entry.touch()
        self._learn_skipped()

    @property
    def plan(self) -> Manifest:
        """The manifest as last read, or as it will be."""
        return self._manifest or self._blank

    def refresh(self) -> None:
        """Read the manifest again."""
        if self.entry is not None:
            self._manifest = self.entry.manifest()
            self._learn_skipped()

    def create(self) -> Entry:
        """The entry, made on disk if it is not there yet and without the shards that were found damaged when it was opened."""
        assert self.entry is not None
        for number, why in list(self._wrong.items()):
            self.redo(number, why)
        if self._manifest is None:
            self._manifest = self.entry.create(self._blank)
        return self.entry

    def missing(self) -> list[int]:
        """Shards to make. One that lacks images counts as missing where bad images are to stop the run."""
        plan = self.plan
        if self.entry is None:
            return list(range(plan.count))
        sound = {n for n, s in plan.shards.items() if n not in self._wrong and not (s.skipped and not self.skip_bad)}
        return [n for n in range(plan.count) if n not in sound]

    def tidy(self) -> None:
        """Remove what processes that died left behind in an entry that is finished."""
        if self.store and self.entry is not None and self.plan.complete:
            self.entry.tidy()

    def note(self, text: str) -> None:
        """Say something in the record, once."""
        if text not in self.notes:
            self.notes.append(text)

    def skip(self, index: int, name: str, reason: str) -> None:
        """Remember an image left out."""
        self.skipped[index] = (name, reason)

    def _learn_skipped(self) -> None:
        if self.skip_bad:
            for facts in self.plan.shards.values():
                for index, name, reason in facts.skipped:
                    self.skip(index, name, reason)

    def redo(self, number: int, wrong: str) -> None:
        """Take a damaged shard out of the entry; the record says so.

        Raises:
            BankError: nothing may be written in this run.
        """
        assert self.entry is not None
        where = f"shard {number} of bank entry {self.entry.folder.name[:12]}"
        if not self.store:
            raise BankError(f"{where}: {wrong}", "run with storing on to redo it")
        self._mapped.pop(number, None)
        self._wrong.pop(number, None)
        try:
            self.entry.drop(number)
        except BankError as error:
            raise BankError(f"{where}: {wrong}, and {error.what}", error.fix) from error
        self.refresh()
        self.note(f"{where} was redone: {wrong}")

    def open(self, number: int) -> MappedShard | None:
        """A finished shard, checked against its checksum once a process; None where it has to be made (again) first."""
        found = self._mapped.pop(number, None)
        if found is None:
            facts = self.plan.shards.get(number)
            if self.entry is None or facts is None:
                return None
            wrong = self.entry.check(number, facts)
            if wrong is not None:
                self.redo(number, wrong)
                return None
            found = MappedShard(self.entry.shard(number), self.view)
        self._mapped[number] = found
        while len(self._mapped) > _OPEN_MAPS:
            self._mapped.pop(next(iter(self._mapped)))
        return found
