"""Leaderboards as text: CSV (wide and long), Markdown, LaTeX; and Parquet. Same leaderboard, same bytes."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rice_eval.errors import MissingExtraError, one_line
from rice_eval.results.files import write_output
from rice_eval.results.leaderboard import Board, Leaderboard, Row
from rice_eval.results.published import Reference

__all__ = [
    "escape_markdown",
    "latex",
    "long_csv",
    "long_json",
    "long_rows",
    "markdown",
    "number",
    "wide_csv",
    "write_parquet",
]

References = Mapping[str, Sequence[Reference]]
"""Board name -> reference rows: numbers printed elsewhere, shown apart and never ranked."""

_DECIMALS = 4  # of a percent in CSV: finer than any interval, coarser than rounding between machines


def number(value: float | int | None, decimals: int = _DECIMALS) -> str:
    """A number with at most this many decimals and no trailing zeros; empty for None and NaN."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, int):
        return str(value)
    text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _csv(rows: Sequence[Sequence[str]]) -> str:
    """Not by the ``csv`` module: whether it quotes a carriage return depends on the version of Python."""
    return "".join(",".join(map(_cell, row)) + "\n" for row in rows)


_SPECIAL = re.compile('[,"\r\n]')
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def _cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if _SPECIAL.search(text) else text


def _plain(text: str) -> str:
    """A name, exactly, but for what a spreadsheet would take for a formula and control characters, which no reader agrees on."""
    shown = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return f"'{shown}" if shown.lstrip().startswith(("=", "+", "-", "@")) else shown


def wide_csv(leaderboard: Leaderboard, references: References | None = None) -> str:
    """One row an encoder, by mean win rate; for each board its value, ``low``, ``high`` and ``rank``.

    Reference rows come last, by encoder and source, with ``reference`` naming the source and no rank. A name that a spreadsheet
    would run as a formula (its first character is one of ``= + - @``) has an apostrophe before it.
    """
    boards = leaderboard.boards
    header = ["encoder", "weights_sha256", "params", "boards", "mean_win_rate", "borda", "reference"]
    for board in boards:
        header += [_plain(f"{board.name}{part}") for part in ("", " low", " high", " rank")]
    on = [{row.encoder: row for row in board.rows} for board in boards]
    lines = [header]
    for standing in leaderboard.standings:
        line = [
            _plain(standing.encoder),
            standing.record.encoder.sha256,
            number(standing.record.encoder.params),
            number(standing.boards),
            number(standing.mean_win_rate),
            number(standing.borda),
            "",
        ]
        for rows in on:
            row = rows.get(standing.encoder)
            line += (
                ["", "", "", ""]
                if row is None
                else [number(row.value), number(row.low), number(row.high), str(row.rank)]
            )
        lines.append(line)
    printed: dict[tuple[str, str], dict[str, float]] = {}
    for board in boards:
        for reference in (references or {}).get(board.name, ()):
            printed.setdefault((reference.label, reference.source), {})[board.name] = reference.value
    for (label, source), values in sorted(printed.items()):
        line = [_plain(label), "", "", "", "", "", _plain(source)]
        for board in boards:
            line += [number(values.get(board.name)), "", "", ""]
        lines.append(line)
    return _csv(lines)


def long_rows(leaderboard: Leaderboard, references: References | None = None) -> list[dict[str, Any]]:
    """One row a board and encoder, boards by name, best first, reference rows last: plain values under stable names.

    A reference row has the protocol that was printed; what was not (key, hash, split, images, ranks) is None.
    """
    out: list[dict[str, Any]] = []
    for board in leaderboard.boards:
        common = {
            "board": board.name,
            "key": board.key,
            "task": board.task,
            "split": board.split,
            "protocol": board.protocol,
            "protocol_hash": board.protocol_hash,
            "metric": board.metric,
            "images": board.images,
        }
        for row in board.rows:
            record = row.record
            out.append(
                common
                | {
                    "encoder": row.encoder,
                    "weights_sha256": record.encoder.sha256,
                    "value": _rounded(row.value),
                    "low": _rounded(row.low),
                    "high": _rounded(row.high),
                    "seed_sd": _rounded(row.seed_sd),
                    "seeds": " ".join(map(str, row.seeds)),
                    "rank": row.rank,
                    "rank_low": row.ranks[0],
                    "rank_high": row.ranks[1],
                    "rank_method": board.method,
                    "near_best": row.near_best,
                    "params": record.encoder.params,
                    "flops": record.cost.flops,
                    "tokens_per_image": _rounded(record.cost.tokens_per_image),
                    "reference": None,
                }
            )
        names = out[-1]
        for reference in (references or {}).get(board.name, ()):
            out.append(
                dict.fromkeys(names)
                | {"board": board.name, "task": board.task, "metric": board.metric, "protocol": reference.protocol}
                | {"encoder": reference.label, "value": _rounded(reference.value), "reference": reference.source}
            )
    return out


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, _DECIMALS)


def long_csv(leaderboard: Leaderboard, references: References | None = None) -> str:
    """``long_rows`` as CSV."""
    rows = long_rows(leaderboard, references)
    header = list(rows[0]) if rows else []

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "" if value is None else number(value) if isinstance(value, int | float) else _plain(value)

    return _csv([header, *[[cell(row[name]) for name in header] for row in rows]])


def long_json(leaderboard: Leaderboard, references: References | None = None) -> str:
    """``long_rows`` as a JSON list."""
    return json.dumps(long_rows(leaderboard, references), indent=1, ensure_ascii=False) + "\n"


def _shown(row: Row) -> str:
    text = f"{row.value:.2f}"
    if row.low is not None and row.high is not None:
        text += f" [{row.low:.2f}, {row.high:.2f}]"
    return text


def _ranks(row: Row) -> str:
    low, high = row.ranks
    return str(row.rank) if low == high else f"{row.rank} ({low}–{high})"


def _caption(board: Board) -> str:
    unit = f", {board.info.unit}" if board.info.unit else ""
    arrow = "higher is better" if board.info.higher_is_better else "lower is better"
    how = "paired bootstrap over images" if board.method == "paired" else "each record's own interval"
    return (
        f"{board.info.title}{unit} ({arrow}), split {board.split}, {board.images} images, protocol {board.protocol} "
        f"{board.protocol_hash}, key {board.key}. Brackets: 95 % intervals; rank intervals from {how}."
    )


def escape_markdown(text: str) -> str:
    """Text as one Markdown table cell, shown as it is: no markup, no formula, no mention of a user."""
    out = one_line(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "|`*_[]~#$":
        out = out.replace(mark, f"\\{mark}")
    return _MENTION.sub("<span>@</span>", out)


_MENTION = re.compile(
    r"(?<!\w)@(?=\w)"
)  # a site may turn @name into a link that notifies someone; name@12345678 is none


def markdown(leaderboard: Leaderboard, references: References | None = None) -> str:
    """A table a board, then the standings. The best is bold, and so is what the set can't tell from it, marked with ≈."""
    parts = ["# Leaderboard", ""]
    for board in leaderboard.boards:
        parts += [f"## {escape_markdown(board.name)}", "", escape_markdown(_caption(board)), ""]
        parts += [
            "| rank | encoder | " + escape_markdown(board.info.title) + " | params | seeds |",
            "|---|---|---|---|---|",
        ]
        for row in board.rows:
            shown = escape_markdown(_shown(row))
            if row.near_best:
                shown = f"**{shown}**" + ("" if row.rank == 1 else " ≈")
            parts.append(
                f"| {_ranks(row)} | {escape_markdown(row.encoder)} | {shown} | {_millions(row.record.encoder.params)} | {len(row.seeds)} |"
            )
        for reference in (references or {}).get(board.name, ()):
            parts.append(
                f"| – | {escape_markdown(reference.label)} (printed: {escape_markdown(reference.source)}) | {reference.value:g} | | |"
            )
        parts.append("")
    if len(leaderboard.boards) > 1:
        parts += ["## All boards", "", "| encoder | boards | mean win rate, % | Borda |", "|---|---|---|---|"]
        for s in leaderboard.standings:
            parts.append(
                f"| {escape_markdown(s.encoder)} | {s.boards} | {number(s.mean_win_rate, 1)} | {number(s.borda, 1)} |"
            )
        parts.append("")
    return "\n".join(parts)


def _millions(params: int) -> str:
    return f"{params / 1e6:.1f}M"


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip


def _tex(text: str) -> str:
    r"""Text as a cell. Brackets and stars are in braces: at the start of a row they would be arguments of ``\\`` before it."""
    return "".join(_TEX.get(c, c) for c in one_line(text))


def latex(leaderboard: Leaderboard, references: References | None = None) -> str:
    r"""A booktabs table: encoders down, boards across. Needs ``\usepackage{booktabs}``.

    The best of a column is bold; what the set can't tell from it carries a dagger.
    """
    boards = leaderboard.boards
    on = [{row.encoder: row for row in board.rows} for board in boards]
    lines = [
        r"\begin{tabular}{l" + "r" * len(boards) + "}",
        r"\toprule",
        " & ".join(["Encoder", *[_tex(f"{b.name} ({b.info.title})") for b in boards]]) + r" \\",
        r"\midrule",
    ]
    for standing in leaderboard.standings:
        cells = [_tex(standing.encoder)]
        for rows in on:
            row = rows.get(standing.encoder)
            cells.append("--" if row is None else _tex_cell(row))
        lines.append(" & ".join(cells) + r" \\")
    printed: dict[tuple[str, str], dict[str, float]] = {}
    for board in boards:
        for reference in (references or {}).get(board.name, ()):
            printed.setdefault((reference.label, reference.source), {})[board.name] = reference.value
    if printed:
        lines.append(r"\midrule")
    for (label, source), values in sorted(printed.items()):
        cells = [rf"\textit{{{_tex(label)}}} ({_tex(source)})"]
        cells += [f"{values[b.name]:g}" if b.name in values else "--" for b in boards]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def _tex_cell(row: Row) -> str:
    shown = f"{row.value:.2f}"
    if row.low is not None and row.high is not None:
        shown += rf"\,{{\scriptsize [{row.low:.2f}, {row.high:.2f}]}}"
    if row.rank == 1:
        return rf"\textbf{{{shown}}}"
    return shown + r"$^\dagger$" if row.near_best else shown


def write_parquet(leaderboard: Leaderboard, path: Path, references: References | None = None) -> None:
    """``long_rows`` as Parquet.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError.of("pyarrow", "report", "a Parquet leaderboard") from error
    rows = long_rows(leaderboard, references)
    types = {
        "images": pyarrow.int64(), "value": pyarrow.float64(), "low": pyarrow.float64(), "high": pyarrow.float64(),
        "seed_sd": pyarrow.float64(), "rank": pyarrow.int64(), "rank_low": pyarrow.int64(), "rank_high": pyarrow.int64(),
        "near_best": pyarrow.bool_(), "params": pyarrow.int64(), "flops": pyarrow.int64(), "tokens_per_image": pyarrow.float64(),
    }  # fmt: skip
    names = list(rows[0]) if rows else []
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in names])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), buffer)
    write_output(path, buffer.getvalue())
