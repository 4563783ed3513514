"""Averages of RICE's main table from its printed cells, against the averages its authors print."""

from __future__ import annotations

import pytest

from rice_eval.cards import catalogue
from rice_eval.errors import NotFoundError
from rice_eval.mllm.averages import GROUPS, average, group, table_1

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


def test_averages_by_the_caption_are_those_of_the_authors_page():
    rows = {(r.encoder, r.resolution): r for r in table_1() if r.protocol == "LLaVA-NeXT+Qwen2.5-7B"}
    assert set(PAGE) < set(rows)
    for key, (ocr, other) in PAGE.items():
        # The page averages cells it has rounded to one decimal.
        assert rows[key].ocr == pytest.approx(ocr, abs=0.1)
        assert rows[key].other == pytest.approx(other, abs=0.1)


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
