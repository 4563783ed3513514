"""Leaderboards from records. A board is one comparability key; there is no rank across keys.

``build`` is a pure function of the records: the same records, in any order, give the same boards, and ``tables`` the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rice_eval.errors import RecordError, UsageError
from rice_eval.metrics.statistics import Floats, MetricInfo, Statistics
from rice_eval.results.bootstrap import replicates, same_images
from rice_eval.results.ranks import borda, competition_ranks, mean_win_rate, rank_intervals
from rice_eval.results.record import Record
from rice_eval.results.runs import encoder_labels, metric_info, unique_runs
from rice_eval.results.store import StoredRecord, paused_collector
from rice_eval.results.student import Spread

__all__ = ["Board", "Leaderboard", "RankMethod", "Row", "Standing", "build"]

RankMethod = Literal["auto", "paired", "intervals"]

_RESAMPLES = 1000
_PAIRED_LIMIT = 400_000
"""Records times images up to which ``auto`` resamples statistics: about half a minute of work."""

_Z = 1.959963984540054  # normal quantile of 0.975


@dataclass(frozen=True)
class Row:
    """An encoder on a board.

    Attributes:
        encoder: label, unique among all records given (``encoder_labels``).
        records: one a seed, by seed.
        value: mean over seeds.
        low, high: 95 % interval over images, and over seeds where there are several; None where a record has none.
        seed_sd: standard deviation over seeds, None for one seed.
        rank: 1 is best; equal values share a rank.
        ranks: 95 % interval of the rank; an encoder without an interval may stand anywhere, and makes room for itself in those of
            the others.
        near_best: whether the rank's interval holds 1: not told apart from the best by this set.
    """

    encoder: str
    records: tuple[StoredRecord, ...]
    value: float
    low: float | None
    high: float | None
    seed_sd: float | None
    rank: int
    ranks: tuple[int, int]
    near_best: bool

    @property
    def record(self) -> Record:
        """The record of the first seed: encoder facts, cost."""
        return self.records[0].record

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds."""
        return tuple(s for r in self.records for s in r.record.seeds)


@dataclass(frozen=True)
class Board:
    """The encoders of one comparability key, best first.

    Attributes:
        name: column name: the task, with protocol, metric and key where the task has several boards.
        method: how rank intervals were made: ``paired`` (bootstrap over the same images for all) or ``intervals`` (draws
            from each record's interval, images taken as independent between encoders).
    """

    name: str
    key: str
    task: str
    protocol: str
    protocol_hash: str
    split: str
    metric: str
    info: MetricInfo
    images: int
    rows: tuple[Row, ...]
    method: str


@dataclass(frozen=True)
class Standing:
    """An encoder over all boards it is on."""

    encoder: str
    record: Record
    boards: int
    mean_win_rate: float | None
    borda: float


@dataclass(frozen=True)
class Leaderboard:
    """Boards by name, and standings by mean win rate (then by name)."""

    boards: tuple[Board, ...]
    standings: tuple[Standing, ...]


def build(stored: Iterable[StoredRecord], method: RankMethod = "auto") -> Leaderboard:
    """Boards and standings.

    Args:
        stored: records, in any order.
        method: how rank intervals are made, see ``Board.method``; ``auto`` takes ``paired`` where every record of a board has
            its statistics and the work stays small.

    Raises:
        RecordError: two records of the same run with different results; statistics missing for ``paired``.
        UsageError: an unknown method.
    """
    if method not in ("auto", "paired", "intervals"):
        raise UsageError(f"ranks can't be made by '{method}'", "choose auto, paired or intervals")
    with paused_collector():
        return _build(stored, method)


def _build(stored: Iterable[StoredRecord], method: RankMethod) -> Leaderboard:
    keyed = unique_runs(stored)
    entries = [entry for _, entry in keyed]
    labels = encoder_labels((e.record.encoder.name, e.record.encoder.sha256) for e in entries)
    by_key: dict[str, dict[str, list[StoredRecord]]] = {}
    for key, entry in keyed:
        label = labels[entry.record.encoder.name, entry.record.encoder.sha256]
        by_key.setdefault(key, {}).setdefault(label, []).append(entry)
    work = sum(e.record.statistics.images for e in entries if e.record.statistics is not None)
    small = work <= _PAIRED_LIMIT
    names = _board_names({key: next(iter(rows.values()))[0].record for key, rows in by_key.items()})
    boards = [_board(names[key], key, rows, method, small) for key, rows in by_key.items()]
    boards.sort(key=lambda b: b.name)
    return Leaderboard(tuple(boards), _standings(boards))


def _board_names(records: dict[str, Record]) -> dict[str, str]:
    """The shortest of task, task + protocol + metric, and these with the key, that tells a task's boards apart."""
    by_task: dict[str, list[str]] = {}
    for key, record in records.items():
        by_task.setdefault(record.task.name, []).append(key)
    names = {}
    for task, keys in by_task.items():
        longer = {k: f"{task} {records[k].protocol.id} {records[k].metric}" for k in keys}
        for key in keys:
            if len(keys) == 1:
                names[key] = task
            elif list(longer.values()).count(longer[key]) == 1:
                names[key] = longer[key]
            else:
                names[key] = f"{longer[key]} {key[:8]}"
    return names


@dataclass(frozen=True)
class _Score:
    """Mean over seeds, its interval, and its standard error; NaN where a record has no interval."""

    value: float
    low: float | None
    high: float | None
    seed_sd: float | None
    se: float


def _board(name: str, key: str, rows: dict[str, list[StoredRecord]], method: RankMethod, small: bool) -> Board:
    first = next(iter(rows.values()))[0].record
    info = metric_info(first)
    sign = 1.0 if info.higher_is_better else -1.0
    scores = {label: _score([e.record for e in entries]) for label, entries in rows.items()}
    draws = None
    if method == "paired" or (method == "auto" and small):
        draws = _paired_draws(rows, scores, required=method == "paired")
    used = "intervals" if draws is None else "paired"
    known = [True] * len(scores)
    if draws is None:
        draws = _independent_draws(key, scores)
        known = [not math.isnan(s.se) for s in scores.values()]
    places = competition_ranks(sign * np.array([s.value for s in scores.values()]))
    spans = _spans(sign * draws, known)
    made = []
    for (label, entries), score, place, span in zip(rows.items(), scores.values(), places, spans):
        ranks = (min(int(place), span[0]), max(int(place), span[1]))
        made.append(
            Row(
                label,
                tuple(entries),
                score.value,
                score.low,
                score.high,
                score.seed_sd,
                int(place),
                ranks,
                ranks[0] == 1,
            )
        )
    made.sort(key=lambda r: (r.rank, r.encoder))
    return Board(
        name=name,
        key=key,
        task=first.task.name,
        protocol=first.protocol.id,
        protocol_hash=first.protocol.comparable_hash,
        split=first.task.test_split,
        metric=first.metric,
        info=info,
        images=first.task.n_test,
        rows=tuple(made),
        method=used,
    )


def _spans(draws: Floats, known: Sequence[bool]) -> list[tuple[int, int]]:
    """Rank interval of each of the E columns of ``(R, E)`` draws, of which only those known say anything."""
    count = len(known)
    unknown = count - sum(known)
    inner = iter(rank_intervals(draws[:, np.array(known)]) if unknown < count else ())
    spans = []
    for has_interval in known:
        low, high = next(inner) if has_interval else (1, sum(known))
        spans.append((low, high + unknown))
    return spans


def _score(records: Sequence[Record]) -> _Score:
    headlines = [r.headline for r in records]
    values = [h.value for h in headlines]
    count = len(values)
    value = math.fsum(values) / count
    sd = math.sqrt(math.fsum((v - value) ** 2 for v in values) / (count - 1)) if count > 1 else None
    se_seeds = 0.0 if sd is None else sd / math.sqrt(count)
    bounds = [(h.low, h.value, h.high) for h in headlines if h.low is not None and h.high is not None]
    if len(bounds) < count:
        return _Score(value, None, None, sd, math.nan)
    down = math.fsum(v - low for low, v, _ in bounds) / count
    up = math.fsum(high - v for _, v, high in bounds) / count
    se_images = (up + down) / (2 * _Z)
    if sd is None:
        return _Score(value, bounds[0][0], bounds[0][2], None, se_images)
    # Images are the same for all seeds, so their part does not shrink with the number of seeds; the heads' part does.
    spread = Spread(((se_images**2, max(1, records[0].task.n_test - 1)), (se_seeds**2, count - 1)))
    if spread.se == 0.0:
        return _Score(value, value, value, sd, 0.0)
    half = spread.quantile(0.975)
    lean = (down / (up + down), up / (up + down)) if se_images > 0 else (0.5, 0.5)  # a skewed interval stays skewed
    return _Score(value, value - 2 * half * lean[0], value + 2 * half * lean[1], sd, half / _Z)


def _paired_draws(rows: dict[str, list[StoredRecord]], scores: dict[str, _Score], required: bool) -> Floats | None:
    """``(R, E)`` bootstrap replicates around each value, over the same images; None where a record has no statistics."""
    if len(rows) < 2:
        return None
    columns = []
    images: Statistics | None = None
    rng = np.random.default_rng(0)
    for label, entries in rows.items():
        parts = []
        for entry in entries:
            if entry.record.statistics is None:
                if required:
                    raise RecordError(
                        f"{entry.path}: has no per-image statistics, which paired ranks need",
                        "leave out --ranks paired, or run the evaluation again",
                    )
                return None
            statistics = entry.statistics()
            if len(statistics) < 2:  # resamples of one image are all alike, and say nothing
                if required:
                    raise RecordError(
                        f"{entry.path}: has one test image, too few to resample", "leave out --ranks paired"
                    )
                return None
            if images is None:
                images = statistics
            try:
                same_images(images, statistics)
            except ValueError as error:
                raise RecordError(
                    f"{entry.path}: {error}", "the test split changed under the records; run again"
                ) from error
            found = replicates(statistics, _RESAMPLES)
            if entry.record.metric not in found:
                raise RecordError(
                    f"{entry.path}: its statistics don't give the headline metric '{entry.record.metric}'",
                    "run the evaluation again",
                )
            parts.append(found[entry.record.metric])
        column = np.mean(parts, axis=0)
        finite = np.isfinite(column)
        if not finite.any():
            return None
        column = np.where(finite, column, column[finite].mean())
        column = column - column.mean() + scores[label].value
        sd = scores[label].seed_sd
        if sd is not None:
            column = column + sd / math.sqrt(len(entries)) * rng.standard_t(len(entries) - 1, _RESAMPLES)
        columns.append(column)
    return np.stack(columns, axis=1)


def _independent_draws(key: str, scores: dict[str, _Score]) -> Floats:
    """``(R, E)`` normal draws around each value with the width of its interval."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    normal = np.random.default_rng(seed).standard_normal((_RESAMPLES, len(scores)))
    centre = np.array([s.value for s in scores.values()])
    draws: Floats = centre + normal * np.nan_to_num([s.se for s in scores.values()])
    return draws


def _standings(boards: Sequence[Board]) -> tuple[Standing, ...]:
    signed = [{r.encoder: (1.0 if b.info.higher_is_better else -1.0) * r.value for r in b.rows} for b in boards]
    wins, points = mean_win_rate(signed), borda(signed)
    first: dict[str, Record] = {}
    count: dict[str, int] = {}
    for board in boards:
        for row in board.rows:
            first.setdefault(row.encoder, row.record)
            count[row.encoder] = count.get(row.encoder, 0) + 1
    made = [Standing(name, record, count[name], wins.get(name), points[name]) for name, record in first.items()]
    made.sort(key=lambda s: (-(s.mean_win_rate if s.mean_win_rate is not None else -1.0), s.encoder))
    return tuple(made)
