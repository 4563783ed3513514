"""What an entry says of itself: the key in clear text, and every finished shard with its checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rice_eval.bank.key import FORMAT_VERSION, BankKey

__all__ = ["Manifest", "ShardFacts"]


@dataclass(frozen=True)
class ShardFacts:
    """A finished shard: its checksum, size, images pushed through the encoder for it, and images left out of it."""

    sha256: str
    bytes: int
    images: int
    skipped: tuple[tuple[int, str, str], ...] = ()

    def plain(self) -> dict[str, Any]:
        """As the manifest has it."""
        out: dict[str, Any] = {"sha256": self.sha256, "bytes": self.bytes, "images": self.images}
        if self.skipped:
            out["skipped"] = [list(s) for s in self.skipped]
        return out


@dataclass(frozen=True)
class Manifest:
    """What an entry says of itself.

    Attributes:
        key: what the entry holds.
        about: names for people (encoder, dataset, split); not part of the key.
        images: images of the split.
        shard_images: images a shard; fixed when the entry is made.
        shards: number -> facts of every finished shard.
    """

    key: BankKey
    about: Mapping[str, str]
    images: int
    shard_images: int
    shards: Mapping[int, ShardFacts]

    @property
    def count(self) -> int:
        """Shards of the finished entry."""
        return -(-self.images // self.shard_images)

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.shards) == self.count

    @property
    def bytes(self) -> int:
        """Bytes of the finished shards."""
        return sum(s.bytes for s in self.shards.values())

    def indices(self, shard: int) -> range:
        """The dataset's indices that belong to a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.images))

    def to_json(self) -> str:
        """The file's text."""
        plain = {
            "format": FORMAT_VERSION,
            "key": self.key.digest,
            "facts": self.key.facts(),
            "about": dict(self.about),
            "images": self.images,
            "shard_images": self.shard_images,
            "shards": {f"{n:05d}": self.shards[n].plain() for n in sorted(self.shards)},
        }
        return json.dumps({**plain, "sum": _sum(plain)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest in a file's text; ValueError or BankError where it is damaged.

        Manifests of earlier versions have no sum; theirs is not checked.
        """
        try:
            plain = json.loads(text)
            if plain.pop("sum", None) not in (None, _sum(plain)):
                raise ValueError("manifest's sum differs")
            shards = {
                int(number): ShardFacts(
                    str(s["sha256"]),
                    int(s["bytes"]),
                    int(s["images"]),
                    tuple((int(i), str(name), str(reason)) for i, name, reason in s.get("skipped", ())),
                )
                for number, s in plain["shards"].items()
            }
            made = cls(
                BankKey.from_facts(plain["facts"]),
                {str(k): str(v) for k, v in plain["about"].items()},
                int(plain["images"]),
                int(plain["shard_images"]),
                shards,
            )
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"manifest lacks {error}") from error
        if made.shard_images < 1 or not all(0 <= n < made.count for n in shards) or plain.get("key") != made.key.digest:
            raise ValueError("manifest contradicts itself")
        return made


def _sum(plain: Mapping[str, Any]) -> str:
    """sha256 over what a manifest says, however it is laid out: a flipped digit of a count leaves sound JSON behind."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
