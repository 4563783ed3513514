"""Numbers printed in papers and repositories: ``results/published/*.csv``, one file a source, each row with its source.

``links.yaml`` beside them says which registry encoder a printed name is, which task a printed benchmark is, and which protocol of
this package runs a printed one. Printed numbers are references: they are shown apart and are never ranked.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rice_eval.cards import data_root, first_problem
from rice_eval.errors import DataError
from rice_eval.results.leaderboard import Board

__all__ = ["COLUMNS", "Recipe", "Reference", "load_published", "references_of"]

COLUMNS = ("encoder", "arch", "resolution", "protocol", "benchmark", "metric", "value", "source", "note")
"""Header of every file. ``resolution`` in pixels or empty; ``protocol`` is kind/id; the rest as printed."""


class Recipe(BaseModel):
    """A protocol of this package that runs a printed one, and what it takes for that.

    Attributes:
        protocol: its id.
        settings: fields that differ from the protocol's defaults where it runs the printed recipe.
        comparable: false where scores can't be expected to agree, for what ``note`` says.
        note: what is known to differ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    protocol: str
    settings: dict[str, Any] = {}
    comparable: bool = True
    note: str = ""


@dataclass(frozen=True)
class Reference:
    """One printed number.

    Attributes:
        encoder, arch, resolution: as printed; resolution in pixels, None where it is not stated.
        kind, protocol: of the protocol, e.g. ``segmentation`` and ``dinov2-linear``.
        benchmark, metric, value: as printed.
        source: paper with table, or repository with commit.
        note: what a reader must know.
        checkpoint: the encoder's registry name, None where it has none.
        task: the benchmark's task name, None where it has none.
        file: the CSV it stands in.
        measure: the metric's name in a record, where that is not the printed one in lower case.
        train_images, test_images: of the printed benchmark's splits, None where they are not known.
        recipes: protocols of this package that run the printed one; where there is no link, that of the same id.
    """

    encoder: str
    arch: str
    resolution: int | None
    kind: str
    protocol: str
    benchmark: str
    metric: str
    value: float
    source: str
    note: str
    checkpoint: str | None
    task: str | None
    file: str
    measure: str | None = None
    train_images: int | None = None
    test_images: int | None = None
    recipes: tuple[Recipe, ...] = ()

    @property
    def label(self) -> str:
        """Encoder, architecture, resolution and protocol in one line."""
        size = f" {self.resolution} px" if self.resolution else ""
        return f"{self.encoder} {self.arch}".strip() + f"{size}, {self.protocol}"

    @property
    def metric_name(self) -> str:
        """The metric by a record's name: where nothing is linked in lower case, ``mIoU`` is ``miou``."""
        return self.measure or self.metric.lower()


class _CheckpointLink(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    encoder: str
    arch: str = ""
    resolution: int | None = None
    checkpoint: str


class _TaskLink(BaseModel):
    """``protocol``: the link is of this printed protocol alone; ``metrics``: printed name -> a record's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    benchmark: str
    task: str
    protocol: str | None = None
    metrics: dict[str, str] = {}
    train_images: int | None = None
    test_images: int | None = None


class _ProtocolLink(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    printed: str
    recipes: tuple[Recipe, ...]


class _Links(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    checkpoints: tuple[_CheckpointLink, ...] = ()
    tasks: tuple[_TaskLink, ...] = ()
    protocols: tuple[_ProtocolLink, ...] = ()


@lru_cache(maxsize=4)
def load_published(folder: Path | None = None) -> tuple[Reference, ...]:
    """Every printed number, by file and line.

    Args:
        folder: of the CSV files; the built-in one by default.

    Raises:
        DataError: names the file, and the line, that does not fit.
    """
    folder = folder if folder is not None else data_root() / "results" / "published"
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise DataError(f"{folder}: holds no published numbers", "check the path")
    links = _load_links(folder / "links.yaml")
    return tuple(r for path in files for r in _load_file(path, links))


def _load_links(path: Path) -> _Links:
    try:
        return _Links.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return _Links()
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error})", "check the file") from error
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}", "see docs/records.md for its fields") from error


def _load_file(path: Path, links: _Links) -> list[Reference]:
    by_encoder = {(c.encoder, c.arch, c.resolution): c.checkpoint for c in links.checkpoints}
    by_benchmark = {(t.kind, t.benchmark, t.protocol): t for t in links.tasks}
    by_protocol = {(p.kind, p.printed): p.recipes for p in links.protocols}
    out = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != COLUMNS:
            raise DataError(f"{path}: its header is not {','.join(COLUMNS)}", "restore the header")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if len(row) != len(COLUMNS):
                raise DataError(f"{where}: has {len(row)} fields, not {len(COLUMNS)}", "quote fields that hold commas")
            fields = dict(zip(COLUMNS, row))
            for name in ("encoder", "protocol", "benchmark", "metric", "value", "source"):
                if not fields[name].strip():
                    raise DataError(f"{where}: '{name}' is empty", "fill it in")
            try:
                value = float(fields["value"])
                resolution = int(fields["resolution"]) if fields["resolution"] else None
            except ValueError as error:
                raise DataError(f"{where}: {error}", "value is a number, resolution a whole number") from error
            kind, _, protocol = fields["protocol"].partition("/")
            if not math.isfinite(value) or not protocol:
                raise DataError(f"{where}: value must be finite and protocol kind/id", "correct the line")
            task = by_benchmark.get((kind, fields["benchmark"], protocol)) or by_benchmark.get(
                (kind, fields["benchmark"], None)
            )
            out.append(
                Reference(
                    encoder=fields["encoder"],
                    arch=fields["arch"],
                    resolution=resolution,
                    kind=kind,
                    protocol=protocol,
                    benchmark=fields["benchmark"],
                    metric=fields["metric"],
                    value=value,
                    source=fields["source"],
                    note=fields["note"],
                    checkpoint=by_encoder.get((fields["encoder"], fields["arch"], resolution)),
                    task=None if task is None else task.task,
                    file=path.name,
                    measure=None if task is None else task.metrics.get(fields["metric"]),
                    train_images=None if task is None else task.train_images,
                    test_images=None if task is None else task.test_images,
                    recipes=by_protocol.get((kind, protocol), (Recipe(protocol=protocol),)),
                )
            )
    return out


def references_of(board: Board, published: Iterable[Reference]) -> list[Reference]:
    """Printed numbers of a board's task and metric, whatever their protocol (their label names it), by label."""
    found = [r for r in published if r.task == board.task and r.metric_name == board.metric]
    return sorted(found, key=lambda r: (r.label, r.source))
