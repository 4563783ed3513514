"""The analysis beside a record's pictures: written, checked, and part of the page's data."""

from __future__ import annotations

import pytest

from rice_eval.errors import RecordError
from rice_eval.report.panel_files import ANALYSIS, load_analysis, load_panels, save_analysis


def test_it_comes_back_and_damage_is_named(tmp_path):
    folder = tmp_path / "x.panels"
    assert load_analysis(folder) is None
    facts = {"ap50": 12.5, "errors": {"missed": [3, 0.25]}, "confusion": {"matrix": [[1, 0], [0, 0]]}}
    save_analysis(folder, facts)
    assert load_analysis(folder) == facts
    assert load_panels(folder) == []
    text = (folder / ANALYSIS).read_text()
    for bad in (text.replace("12.5", "99.5"), "{}", "no", "[1]"):
        (folder / ANALYSIS).write_text(bad)
        with pytest.raises(RecordError, match="analysis.jsonl is damaged"):
            load_analysis(folder)
    with pytest.raises(ValueError, match="JSON compliant|Out of range"):
        save_analysis(folder, {"ap50": float("nan")})
