"""``rice-eval plan --estimate``: a measured rate, and what it means for the usual sets."""

from __future__ import annotations

import pytest

from rice_eval.bank.estimate import SIZING_ENCODERS, SIZING_SETS
from rice_eval.preview import preview, sizing


def test_an_estimate_sizes_the_usual_passes(tmp_path, monkeypatch):
    monkeypatch.setattr("rice_eval.preview.measure_rate", lambda *a, **k: 10.0)
    rows = preview(
        ["rgb-moments", "random-vit-s-14"], ["segmentation/scenes"], view="square=56", bank=tmp_path, estimate=True,
        limit_train=2, limit_test=2, settings={"layer_set": "last"}, protocols=["linear"],
    )  # fmt: skip
    counted = [row for row in rows if row["TFLOP/s"]]
    assert {row["encoder"] for row in counted} == {"random-vit-s-14"}
    assert all(row["seconds"] == pytest.approx(row["images"] / 10, abs=0.05) for row in rows)
    # ViT-S/14 at 16 patches and a class token: 12 blocks of 24 D^2 a token and little else.
    assert counted[0]["TFLOP/s"] == pytest.approx(10 * 12 * 17 * 24 * 384**2 / 1e12, rel=0.1)
    table = sizing(rows)
    assert len(table) == len(SIZING_ENCODERS) * len(SIZING_SETS)
    assert all(row["hours on 1"] == pytest.approx(8 * row["hours on 8"], rel=0.01) for row in table)
    assert sizing([row for row in rows if row["encoder"] == "rgb-moments"]) == []
