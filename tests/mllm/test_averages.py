"""Averages of RICE's main table from its printed cells, against the averages its authors print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rice_eval.cards import catalogue
from rice_eval.cli.main import main
from rice_eval.errors import NotFoundError
from rice_eval.mllm.averages import GROUPS, TableRow, average, group, table_1
from rice_eval.results.published import load_published

# The averages on the authors' project page (github.com/deepglint/MVT, docs/index.html at commit 087c80e), one decimal each;
# they follow the caption's formula.
PAGE = {
    ("CLIP", 336): (52.3, 67.6),
    ("MLCD", 336): (53.6, 69.7),
    ("AIMv2", 336): (54.2, 68.3),
    ("RICE", 336): (56.2, 70.5),
    ("DFN5B", 378): (49.8, 66.7),
    ("SigLIP", 384): (54.3, 68.4),
    ("SigLIPv2", 384): (56.0, 69.5),
    ("RICE", 378): (58.0, 70.1),
    ("SigLIPv2", 560): (60.9, 71.1),
    ("RICE", 560): (61.1, 70.8),
    ("Qwen2.5-ViT (from Qwen2.5-VL-7B)", 560): (62.9, 72.5),
}

HALF = 0.005 + 1e-9
"""A printed average of two decimals lies this near the mean it was rounded from."""

CELLS_HALF = (0.5 / 6 + 0.5 / 20 + 5 * 0.005) / 7
"""How far the mean of the printed cells may lie from the mean of the measured ones: MME is printed in whole points, the others
in hundredths."""


def _rows() -> dict[tuple[str, int | None, str], TableRow]:
    return {(r.encoder, r.resolution, r.protocol): r for r in table_1()}


def test_printed_averages_follow_the_rule_of_six():
    rows = table_1()
    assert len(rows) == 14
    exact = 0
    for row in rows:
        assert row.ocr_printed is not None
        assert row.other_printed is not None
        assert row.ocr == pytest.approx(row.ocr_printed, abs=HALF)
        assert row.other_printed_rule == pytest.approx(row.other_printed, abs=HALF + CELLS_HALF)
        exact += abs(row.other_printed_rule - row.other_printed) <= HALF
        # The caption's formula is no explanation of what is printed: it is points away.
        assert row.other_printed - row.other > 1.5
    assert exact == 12


def test_averages_by_the_caption_are_those_of_the_second_printing():
    """LLaVA-OneVision-1.5, Table 2: the mean of cells of one decimal each, OCRBench / 10, cognition / 8, perception / 20."""
    seen = 0
    printed: dict[tuple[str, int | None, str], dict[str, float]] = {}
    for n in load_published():
        if n.file == "rice-table-1.csv":
            printed.setdefault((n.encoder, n.resolution, n.protocol), {})[n.benchmark] = n.value
    for key, row in _rows().items():
        if row.ocr_reprinted is None:
            assert row.other_reprinted is None
            continue
        seen += 1
        for name, told in (("rice-ocr-avg", row.ocr_reprinted), ("rice-other-avg", row.other_reprinted)):
            # 1e-9: 5.25 and the like are printed rounded up, and may lie below in binary.
            tenths = [round(printed[key][c.printed] / c.divide + 1e-9, 1) for c in GROUPS[name].cells]
            assert round(sum(tenths) / 7, 1) == told
    assert seen == 11


def test_averages_by_the_caption_are_those_of_the_authors_page():
    rows = _rows()
    for (encoder, resolution), (ocr, other) in PAGE.items():
        row = rows[encoder, resolution, "LLaVA-NeXT+Qwen2.5-7B"]
        # The page averages cells it has rounded to one decimal.
        assert row.ocr == pytest.approx(ocr, abs=0.1)
        assert row.other == pytest.approx(other, abs=0.1)


def test_documentation_shows_the_table():
    """Every row of docs/mllm.md is what the cells give now."""
    told = (Path(__file__).parents[2] / "docs" / "mllm.md").read_text(encoding="utf-8")
    for r in table_1():
        cells = [f"{r.encoder} {r.arch}", str(r.resolution), r.protocol]
        cells += [f"{r.ocr:.2f}", _two(r.ocr_printed), _one(r.ocr_reprinted)]
        cells += [f"{r.other:.2f}", _one(r.other_reprinted), f"{r.other_printed_rule:.2f}", _two(r.other_printed)]
        assert f"| {' | '.join(cells)} |" in told


def _one(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def test_command_prints_all_three(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["mllm", "averages", "--json"])
    assert end.value.code == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["other"], first["other, cognition / 6"], first["other printed"]) == (67.54, 69.83, 69.83)


def test_every_row_of_the_table_is_complete():
    assert len(table_1()) == 14


def test_rice_560_by_hand():
    row = next(r for r in table_1() if r.encoder == "RICE" and r.resolution == 560)
    assert row.ocr == pytest.approx((53.15 + 87.38 + 78.08 + 68.96 + 60.7 + 26.14 + 53.03) / 7)
    rest = 76.88 + 78.61 + 1585 / 20 + 88.94 + 65.10 + 50.47
    assert row.other == pytest.approx((rest + 450 / 8) / 7)
    assert row.other_printed_rule == pytest.approx((rest + 450 / 6) / 7)


def test_a_missing_cell_leaves_no_average():
    cells = {(c.task, c.metric): 50.0 for c in GROUPS["rice-ocr-avg"].cells[1:]}
    assert average(GROUPS["rice-ocr-avg"], cells) is None


def test_groups_name_cards():
    cards = catalogue().tasks
    for one in GROUPS.values():
        for cell in one.cells:
            card = cards[cell.task]
            assert card.lmms is not None
            assert cell.metric in {m.name for m in card.lmms.metrics}


def test_unknown_group():
    with pytest.raises(NotFoundError, match="rice-ocr-avg"):
        group("rice-ocr")
