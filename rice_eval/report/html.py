"""One self-contained HTML page of records: no network, no code but its own, every name shown as text."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from rice_eval.errors import UsageError
from rice_eval.report.boards import first_record, leaderboard_of, sorted_boards
from rice_eval.report.data import DETAIL_BYTES, PICTURE_BYTES, page_data
from rice_eval.results.leaderboard import Board
from rice_eval.results.published import Reference, load_published
from rice_eval.results.record import Record
from rice_eval.results.store import write_atomic

__all__ = ["embedded_json", "render", "write_report"]

_STYLES = ("base.css", "table.css", "charts.css", "print.css")
_SCRIPTS = (
    "core.js",
    "table.js",
    "overview.js",
    "charts.js",
    "plots.js",
    "classes.js",
    "detection.js",
    "pictures.js",
    "cards.js",
    "app.js",
)


def write_report(
    records: Sequence[tuple[Record, Path]],
    out: Path,
    title: str = "Dense vision encoders",
    *,
    published: Sequence[Reference] | None = None,
    detail_bytes: int = DETAIL_BYTES,
    picture_bytes: int = PICTURE_BYTES,
) -> Path:
    """Write the page.

    Args:
        records: records with the files they came from; panels are looked for beside each file (``panel_files``).
        out: the HTML file; it is replaced in one step. Equal records give equal bytes.
        title: of the page, text only.
        published: printed numbers, shown beside the boards of their task and metric; those of ``results/published`` by default.
        detail_bytes: room for per-class values, curves and provenance.
        picture_bytes: room for pictures.

    Returns:
        ``out``.

    Raises:
        RecordError: damaged panels, or two records of one run with different results.
        UsageError: ``out`` can't be written.
    """
    page = render(records, title, published=published, detail_bytes=detail_bytes, picture_bytes=picture_bytes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UsageError(
            f"{out} can't be written ({error.strerror})", "free some space or choose another folder"
        ) from error
    return out


def render(
    records: Sequence[tuple[Record, Path]],
    title: str,
    *,
    published: Sequence[Reference] | None = None,
    detail_bytes: int = DETAIL_BYTES,
    picture_bytes: int = PICTURE_BYTES,
) -> str:
    """The page as text; see ``write_report``."""
    leaderboard = leaderboard_of(records)
    numbers = load_published() if published is None else published
    data = page_data(leaderboard, title, published=numbers, detail_bytes=detail_bytes, picture_bytes=picture_bytes)
    style = "\n".join(_asset(name) for name in _STYLES)
    script = '(() => {\n"use strict";\n' + "\n".join(_asset(name) for name in _SCRIPTS) + "\n})();"
    # Hashes let these two run and nothing else; with default-src 'none' the page can't send or fetch anything.
    policy = (
        f"default-src 'none'; script-src '{_csp(script)}'; style-src '{_csp(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<div id="app"></div>
<noscript>
<main class="plain">
<h1><bdi>{escape(title)}</bdi></h1>
<p>Sorting, plots and pictures need JavaScript; the tables below don't.</p>
{_plain_tables(sorted_boards(leaderboard))}
</main>
</noscript>
<script type="application/json" id="data">{embedded_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def embedded_json(data: Any) -> str:
    """JSON that can stand inside a script element: plain ASCII, and no character that HTML gives a meaning."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _csp(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return resources.files("rice_eval.report").joinpath("assets", name).read_text(encoding="utf-8").strip()


def _plain_tables(boards: Sequence[Board], rows: int = 10) -> str:
    """The best rows of every board, for readers without scripts."""
    parts = []
    for board in boards:
        first = first_record(board)
        lines = []
        for row in board.rows[:rows]:
            span = "" if row.low is None or row.high is None else f"{row.low:.1f} to {row.high:.1f}"
            lines.append(
                f"<tr><td>{row.rank}</td><td><bdi>{escape(row.encoder)}</bdi></td>"
                f"<td>{row.value:.1f}</td><td>{span}</td></tr>"
            )
        left = f"<p>{len(board.rows) - rows} more rows.</p>" if len(board.rows) > rows else ""
        parts.append(
            f"<h2><bdi>{escape(first.task.name)}</bdi>, <bdi>{escape(first.protocol.id)}</bdi>, "
            f"<bdi>{escape(first.view)}</bdi></h2><table><thead><tr><th>Rank</th><th>Encoder</th>"
            f"<th>{escape(first.metric)}</th><th>95 % interval</th></tr></thead><tbody>{''.join(lines)}</tbody></table>{left}"
        )
    return "\n".join(parts)
