"""Which run a record is of, what its encoder is called where names are not enough, and how its headline is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rice_eval.errors import RecordError
from rice_eval.metrics.statistics import METRICS, MetricInfo
from rice_eval.results.record import Record
from rice_eval.results.store import StoredRecord

__all__ = ["encoder_labels", "metric_info", "of_encoder", "unique_runs"]

_DIGITS = (0, 8, 12, 16, 24, 32, 48, 64)
"""Digits of the weights' sha256 that a label tries, fewest first."""


def unique_runs(stored: Iterable[StoredRecord]) -> list[tuple[str, StoredRecord]]:
    """Every run once with its comparability key, in an order that depends on the records alone.

    Of records of one run that measured the same (run again, copied, moved) the newest is kept.

    Raises:
        RecordError: two records of one run (encoder, weights, key, seeds) that measured something else.
    """
    found: dict[str, tuple[str, StoredRecord]] = {}
    keys: dict[tuple[str, ...], str] = {}
    for entry in stored:
        record = entry.record
        task = record.task
        facts = (
            task.name, task.train_fingerprint, task.test_fingerprint, task.test_split, record.metric, record.protocol.id,
            record.protocol.hash, *record.skipped,
        )  # fmt: skip
        # What the key is made of (the protocol's hash says more than enough): worked out once a set, not once a record.
        key = keys.get(facts)
        if key is None:
            key = keys[facts] = record.comparability_key
        identity = record.identity_of(key)
        _, other = found.setdefault(identity, (key, entry))
        if other.record.sha256 == record.sha256:
            continue
        if _measured(other.record) != _measured(record):
            raise RecordError(
                f"{entry.path} and {other.path} are two records of the same run ({record.encoder.name} on "
                f"{task.name}) with different contents",
                "keep one of them",
            )
        if (record.created, record.sha256) > (other.record.created, other.record.sha256):
            found[identity] = (key, entry)
    ordered = sorted(found, key=lambda i: (found[i][1].record.encoder.name, found[i][1].record.seeds, i))
    return [found[identity] for identity in ordered]


def _measured(record: Record) -> tuple[object, ...]:
    """What two records of one run have to agree in; times, paths and versions may differ."""
    statistics = None if record.statistics is None else record.statistics.sha256
    return record.metrics, record.per_class, statistics


def encoder_labels(encoders: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(name, sha256 of the weights) -> a label that no other has: the name, with ``@`` and digits of the sha256 where it needs them.

    Where several weights go by one name there are eight digits, and more where eight are not enough.
    """
    distinct = sorted(set(encoders))
    counts = Counter(name for name, _ in distinct)
    digits = [_DIGITS[1] if counts[name] > 1 else _DIGITS[0] for name, _ in distinct]
    while True:
        labels = [f"{name}@{sha[:n]}" if n else name for (name, sha), n in zip(distinct, digits)]
        users: dict[str, list[int]] = {}
        for k, label in enumerate(labels):
            users.setdefault(label, []).append(k)
        clashing = [k for group in users.values() if len(group) > 1 for k in group if digits[k] < _DIGITS[-1]]
        if not clashing:
            return dict(zip(distinct, labels))
        for k in clashing:
            digits[k] = _DIGITS[_DIGITS.index(digits[k]) + 1]


def of_encoder(stored: Sequence[StoredRecord], wanted: str) -> list[StoredRecord]:
    """Records of the encoder of this name, or of this label (``name@digits``); empty where there is none."""
    found = [e for e in stored if e.record.encoder.name == wanted]
    if found:
        return found
    name, _, digits = wanted.rpartition("@")
    return [
        e for e in stored if digits and e.record.encoder.name == name and e.record.encoder.sha256.startswith(digits)
    ]


def metric_info(record: Record) -> MetricInfo:
    """How to read a record's headline: as ``METRICS`` has it, or as the record says for a metric that is not known here."""
    headline = record.headline
    known = METRICS.get(record.metric)
    if known is not None:
        return known
    unit = headline.unit
    return MetricInfo(
        record.metric,
        unit="nats" if unit == "nats" else "%" if unit == "%" else "",
        higher_is_better=headline.higher_is_better,
    )
