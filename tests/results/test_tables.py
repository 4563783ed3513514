"""Tables as other programs read them: spreadsheets, TeX, Markdown sites, terminals."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from result_factory import make_record

from rice_eval.cli.tables import print_table, table_text
from rice_eval.errors import UsageError, one_line
from rice_eval.results import tables
from rice_eval.results.leaderboard import Leaderboard, build
from rice_eval.results.published import Reference
from rice_eval.results.store import StoredRecord


def board_of(*names: str) -> Leaderboard:
    return build([StoredRecord(Path(f"{k}.json"), make_record(n, value=70.0 - k)) for k, n in enumerate(names)])


@pytest.mark.parametrize("name", ["a\rb", "a\r\nb", "a\nb", 'a"b', "a,b", "\r", "tab\tbed"])
@pytest.mark.parametrize("write", [tables.wide_csv, tables.long_csv])
def test_csv_reads_back_on_every_python(name: str, write: object) -> None:
    assert callable(write)
    text = write(board_of("first", name))
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert {len(row) for row in rows} == {len(rows[0])}
    column = rows[0].index("encoder")
    assert [row[column] for row in rows[1:]] == ["first", name]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x")'])
@pytest.mark.parametrize("write", [tables.wide_csv, tables.long_csv])
def test_no_name_is_a_formula(name: str, write: object) -> None:
    assert callable(write)
    found = build([StoredRecord(Path("x"), make_record(name, task=f"{name}/x"))])
    for row in csv.reader(io.StringIO(write(found), newline="")):
        assert not [cell for cell in row if cell.lstrip().startswith(("=", "+", "-", "@"))], row


def test_numbers_below_zero_stay_numbers() -> None:
    found = build([StoredRecord(Path("x"), make_record(value=-3.5, low=-4.0, high=-3.0))])
    (row,) = csv.DictReader(io.StringIO(tables.wide_csv(found)))
    assert row["segmentation/toy"] == "-3.5"


def test_nul_and_other_controls_reach_no_file() -> None:
    found = board_of("a\0b\x1b[31mc")
    for write in (tables.wide_csv, tables.long_csv, tables.markdown, tables.latex):
        assert not {"\0", "\x1b"} & set(write(found)), write
    assert next(csv.DictReader(io.StringIO(tables.wide_csv(found))))["encoder"] == r"a\x00b\x1b[31mc"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("$x$", r"\$x\$"),
        ("@user and @other", "<span>@</span>user and <span>@</span>other"),
        ("clip@12345678", "clip@12345678"),
        ("\u202eabc", r"\\u202eabc"),
        ("a\u2066b", r"a\\u2066b"),
        ("a|b", r"a\|b"),
    ],
)
def test_markdown_cells(text: str, shown: str) -> None:
    assert tables.escape_markdown(text) == shown


def test_rows_of_latex_open_no_argument() -> None:
    rows = [line for line in tables.latex(board_of("[1ex] x", "*", "plain")).split("\n") if line.endswith(r"\\")]
    assert rows[1].startswith("{[}1ex{]} x & ")
    assert rows[2].startswith("{*} & ")
    assert rows[3].startswith("plain & ")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_compiles(tmp_path: Path) -> None:
    text = tables.latex(board_of("[1ex] x", "*", r"\end{tabular} & % $ # _ ^ ~ <>|", "a\0b"))
    (tmp_path / "x.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n" + text + "\\end{document}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=batchmode", "-halt-on-error", "x.tex"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, (tmp_path / "x.log").read_text()[-2000:]


def test_the_terminal_is_not_driven_by_names(capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b[2Jgone\u202e"
    print_table([{name: name, "n": 1}], title=name)
    out = capsys.readouterr().out
    assert out == table_text([{name: name, "n": 1}], title=name) + "\n"
    assert not {"\x1b", "\u202e"} & set(out)
    assert out.count(r"\x1b[2Jgone\u202e") == 3
    assert str(UsageError(f"{name} is unknown", "choose")) == r"\x1b[2Jgone\u202e is unknown; choose"


def test_one_line_leaves_words_alone() -> None:
    assert one_line(" Grüße,\n 日本語\t\u05d0 \N{EM DASH} 🙂 ") == "Grüße, 日本語 \u05d0 \N{EM DASH} 🙂"


def test_reference_rows_carry_what_was_printed() -> None:
    """Neither our protocol's hash and key nor our split and number of images were printed."""
    reference = Reference(
        encoder="Paper", arch="ViT-L/14", resolution=518, kind="segmentation", protocol="dinov2-linear", benchmark="Toy",
        metric="accuracy", value=99.9, source="Table 1", note="", checkpoint=None, task="segmentation/toy", file="x.csv",
    )  # fmt: skip
    printed = {"segmentation/toy": [reference]}
    ours, theirs = tables.long_rows(board_of("a"), printed)
    assert set(ours) == set(theirs)
    assert {k: v for k, v in theirs.items() if v is not None} == {
        "board": "segmentation/toy", "task": "segmentation/toy", "metric": "accuracy", "protocol": "dinov2-linear",
        "encoder": "Paper ViT-L/14 518 px, dinov2-linear", "value": 99.9, "reference": "Table 1",
    }  # fmt: skip
    row = list(csv.DictReader(io.StringIO(tables.long_csv(board_of("a"), printed))))[1]
    assert [row[name] for name in ("protocol_hash", "key", "split", "images")] == [""] * 4
    assert json.loads(tables.long_json(board_of("a"), printed))[1]["images"] is None
