"""The page's data: boards as columns of plain JSON values, details and pictures within a budget of bytes."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from rice_eval import __version__
from rice_eval.metrics.statistics import METRICS
from rice_eval.report.boards import first_record, row_metrics, sorted_boards
from rice_eval.report.panel_files import StoredPanel, load_analysis, load_panels, panels_folder
from rice_eval.results.curves import curve_metric, spans
from rice_eval.results.leaderboard import Board, Leaderboard, Row
from rice_eval.results.published import Reference, references_of
from rice_eval.results.record import HeadScore, Metric, Record, canonical_json
from rice_eval.results.sweeps import layer_scores, share, sweep_family

__all__ = ["DETAIL_BYTES", "PICTURE_BYTES", "page_data"]

Plain = dict[str, Any]

DETAIL_BYTES = 3_500_000
"""Room for per-class values, layer curves and provenance; with the pictures and 20,000 rows a page stays under 10 MB."""

PICTURE_BYTES = 3_500_000
"""Room for pictures, counted as base64."""


@dataclass
class _Page:
    encoders: list[Plain] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    protocols: list[Plain] = field(default_factory=list)
    protocol_numbers: dict[str, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    text_numbers: dict[str, int] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    picture_numbers: dict[bytes, int] = field(default_factory=dict)

    def encoder(self, label: str, record: Record) -> int:
        """Number of the encoder; its facts are kept once."""
        if label not in self.numbers:
            self.numbers[label] = len(self.encoders)
            facts = record.encoder.model_dump(mode="json", exclude={"mean", "std"})
            self.encoders.append({**facts, "label": label})
        return self.numbers[label]

    def protocol(self, record: Record) -> int:
        """Number of the protocol card."""
        if record.protocol.hash not in self.protocol_numbers:
            self.protocol_numbers[record.protocol.hash] = len(self.protocols)
            self.protocols.append(record.protocol.model_dump(mode="json"))
        return self.protocol_numbers[record.protocol.hash]

    def text(self, text: str) -> int:
        """Number of a text that many rows share."""
        if text not in self.text_numbers:
            self.text_numbers[text] = len(self.texts)
            self.texts.append(text)
        return self.text_numbers[text]


def page_data(
    leaderboard: Leaderboard,
    title: str,
    *,
    published: Sequence[Reference] = (),
    detail_bytes: int = DETAIL_BYTES,
    picture_bytes: int = PICTURE_BYTES,
) -> Plain:
    """Everything the page shows, as plain JSON values.

    ``published`` numbers of a board's task and metric stand beside its rows, never among them.

    Rows are never left out. Details and pictures are taken in the order of ranks, all boards side by side, until their room is
    used; each board counts what was left out, and the page says so.
    """
    page = _Page()
    boards = sorted_boards(leaderboard)
    plain = [_board(page, board, published) for board in boards]
    room = detail_bytes
    for number, place, row in _by_rank(boards):
        if room <= 0:
            break
        detail = _detail(page, plain[number], row)
        room -= len(canonical_json(detail))
        if room >= 0:
            plain[number]["detail"][place] = detail
    _pictures(page, boards, plain, picture_bytes)
    records = [stored.record for board in boards for row in board.rows for stored in row.records]
    standings = {s.encoder: s.mean_win_rate for s in leaderboard.standings}
    return {
        "title": title,
        "version": __version__,
        "records": len(records),
        "newest": max((record.created for record in records), default=""),
        "encoders": [{**e, "wins": _short(standings[e["label"]], 2)} for e in page.encoders],
        "protocols": page.protocols,
        "texts": page.texts,
        "boards": plain,
        "pictures": page.pictures,
    }


def _by_rank(boards: Sequence[Board]) -> Iterator[tuple[int, int, Row]]:
    """(number of the board, place in it, row): the best of every board, then the second best…"""
    for place, rows in enumerate(zip_longest(*(board.rows for board in boards))):
        for number, row in enumerate(rows):
            if row is not None:
                yield number, place, row


def _board(page: _Page, board: Board, published: Sequence[Reference]) -> Plain:
    first = first_record(board)
    metrics = [row_metrics(board, row) for row in board.rows]
    names = _ordered(board.metric, {name for found in metrics for name in found})
    per_class: dict[str, None] = {}
    for row in board.rows:
        for values in row.record.per_class.values():
            per_class.update(dict.fromkeys(values))
    known = set(first.task.classes)
    classes = [c for c in first.task.classes if c in per_class] + [c for c in per_class if c not in known]
    return {
        "key": board.key,
        "task": first.task.model_dump(mode="json", exclude={"classes"}),
        "view": first.view,
        "protocol": page.protocol(first),
        "comparability": first.comparability(),
        "interval": None if first.interval is None else first.interval.model_dump(mode="json"),
        "family": sweep_family(first, "view"),
        "labels": _short(float(share(first))),
        "labelFamily": sweep_family(first, "labels"),
        "classes": classes,
        "method": board.method,
        "metrics": [_metric(name, [found.get(name) for found in metrics]) for name in names],
        "encoder": [page.encoder(row.encoder, row.record) for row in board.rows],
        "rank": [row.rank for row in board.rows],
        "rankLow": [row.ranks[0] for row in board.rows],
        "rankHigh": [row.ranks[1] for row in board.rows],
        "seeds": [len(set(row.seeds)) for row in board.rows],
        "seedSd": [_short(row.seed_sd) for row in board.rows],
        "flops": [row.record.cost.flops for row in board.rows],
        "tokens": [_short(row.record.cost.tokens_per_image) for row in board.rows],
        "speed": [_best_speed(row) for row in board.rows],
        "layers": ["+".join(map(str, row.record.layers)) for row in board.rows],
        "warnings": {
            place: sorted({page.text(w) for stored in row.records for w in stored.record.warnings})
            for place, row in enumerate(board.rows)
            if any(stored.record.warnings for stored in row.records)
        },
        "printed": [
            [r.label, _short(r.value), r.source, r.note]
            for r in sorted(
                references_of(board, published), key=lambda r: -r.value if board.info.higher_is_better else r.value
            )
        ],
        "detail": {},
        "panels": [],
        "panelsLeftOut": 0,
    }


def _ordered(main: str, names: set[str]) -> list[str]:
    """The main metric, other readings of it (``blind_accuracy``, ``mask_ap``), then the rest: a table shows the first few."""
    return [main, *sorted(names - {main}, key=lambda name: (not name.endswith(f"_{main}"), name))]


def _metric(name: str, known: Sequence[Metric | None]) -> Plain:
    sample = next(m for m in known if m is not None)
    info = METRICS.get(name)
    return {
        "name": name,
        "title": info.title if info else name.replace("_", " "),
        "unit": sample.unit,
        "higher": sample.higher_is_better,
        "value": [None if m is None else _short(m.value) for m in known],
        "low": [None if m is None else _short(m.low) for m in known],
        "high": [None if m is None else _short(m.high) for m in known],
    }


def _detail(page: _Page, board: Plain, row: Row) -> Plain:
    record, path = row.record, row.records[0].path
    env = record.environment
    metric = curve_metric(record)
    known = spans(row.records[0], [metric]).get(metric, {}) if metric is not None else {}
    return {
        "classes": {
            metric: [_short(values.get(c), 2) for c in board["classes"]] for metric, values in record.per_class.items()
        },
        "spans": {metric: [_span(known.get(c)) for c in board["classes"]]} if known else {},
        "layers": _layer_curve(record.heads),
        "heads": len(record.heads),
        "chosen": record.chosen,
        "seconds": {name: _short(s, 1) for name, s in record.seconds.items()},
        "memory": _short(record.peak_memory_mb, 0),
        "forwards": record.cost.forwards,
        "norm": record.norm,
        "bank": None if record.bank is None else {"dtype": record.bank.dtype, "bytes": record.bank.bytes},
        "seeds": [list(stored.record.seeds) for stored in row.records],
        "values": [_short(stored.record.headline.value) for stored in row.records],
        "created": record.created,
        "analysis": load_analysis(panels_folder(path)),
        "file": path.name,
        "sha256": record.sha256[:16],
        "skipped": list(record.skipped),
        "env": page.text(
            f"rice-eval {env.rice_eval} ({env.git or 'no git state'}), Python {env.python}, {env.platform}"
        ),
        "device": page.text(f"{env.device}, {env.threads} threads"),
        "packages": page.text(", ".join(f"{k} {v}" for k, v in sorted(env.packages.items()))),
    }


def _layer_curve(heads: Sequence[HeadScore]) -> list[list[float]]:
    """[layer, best held-out score] of the heads that read one layer, by layer."""
    return [[layer, round(score, 4)] for layer, score in layer_scores(heads).items()]


def _pictures(page: _Page, boards: Sequence[Board], plain: Sequence[Plain], room: int) -> None:
    for number, place, row in _by_rank(boards):
        folder = panels_folder(row.records[0].path)
        entry = plain[number]
        if room <= 0:
            entry["panelsLeftOut"] += folder.is_dir()
            continue
        for panel in load_panels(folder):
            size = sum(len(tile.data) * 4 // 3 for tile in panel.tiles if tile.data not in page.picture_numbers)
            if size > room:
                entry["panelsLeftOut"] += 1
                room = 0
                break
            room -= size
            entry["panels"].append(_panel(page, place, panel))


def _panel(page: _Page, place: int, panel: StoredPanel) -> Plain:
    tiles = {}
    for tile in panel.tiles:
        if tile.data not in page.picture_numbers:
            page.picture_numbers[tile.data] = len(page.pictures)
            page.pictures.append(base64.b64encode(tile.data).decode())
        tiles[tile.role] = [page.picture_numbers[tile.data], tile.width, tile.height]
    return {
        "row": place,
        "image": panel.image_id,
        "index": panel.index,
        "note": panel.note,
        "legend": [[entry.name, "#{:02x}{:02x}{:02x}".format(*entry.color)] for entry in panel.legend],
        "tiles": tiles,
    }


def _best_speed(row: Row) -> float | None:
    """Images a second of the pass that made the tokens: the fastest of the seeds, None where all came from the bank."""
    known = [v for v in (stored.record.cost.images_per_second for stored in row.records) if v is not None]
    return _short(max(known), 2) if known else None


def _span(span: tuple[float, float] | None) -> list[float | None] | None:
    return None if span is None else [_short(value, 2) for value in span]


def _short(value: float | None, digits: int = 4) -> float | None:
    if value is None:
        return None
    rounded = round(value, digits)
    return int(rounded) if rounded == int(rounded) else rounded
