"""Curves over shares of labels, layers and resolutions, from records; and the sweep that makes the records."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from result_factory import make_record

from rice_eval.errors import UsageError
from rice_eval.results.record import Cost, HeadScore
from rice_eval.results.sweeps import sweep_csv, sweep_json, sweep_points


def of_labels(labels: str | None, seed: int, value: float, **more):
    settings = {} if labels is None else {"labels": labels}
    return make_record(value=value, seed=seed, settings=settings, **more)


def test_shares_are_means_over_splits_in_order():
    records = [
        of_labels(None, 0, 80.0),
        of_labels("1/64", 0, 40.0),
        of_labels("1/64", 1, 44.0),
        of_labels("1/8", 0, 60.0),
    ]
    records += [of_labels("1/8", 0, 10.0, encoder="other", weights="b" * 64)]
    points = sweep_points(records, "labels")
    assert [(p.encoder, p.name, p.value, p.runs) for p in points] == [
        ("toy-vit", "1/64", 42.0, 2), ("toy-vit", "1/8", 60.0, 1), ("toy-vit", "all", 80.0, 1),
    ]  # fmt: skip
    assert points[0].x == 1 / 64
    assert points[0].sd == pytest.approx(8**0.5)
    assert points[1].sd is None


def test_other_settings_tasks_and_weights_make_other_curves():
    whole = of_labels(None, 0, 80.0)
    for other in (
        make_record(value=1.0, settings={"labels": "1/8", "steps": 3}),
        make_record(value=1.0, task="segmentation/else", settings={"labels": "1/8"}),
        make_record(value=1.0, weights="c" * 64, settings={"labels": "1/8"}),
    ):
        assert sweep_points([whole, other], "labels") == []


def test_the_later_of_two_equal_runs_counts():
    old, new = (of_labels("1/8", 0, v, created=f"2026-01-0{d}T00:00:00Z") for d, v in ((1, 1.0), (2, 2.0)))
    points = sweep_points([new, of_labels(None, 0, 9.0), old], "labels")
    assert [p.value for p in points] == [2.0, 9.0]


def test_layers_are_the_best_held_out_heads():
    heads = [
        HeadScore(settings={"layer": n, "lr": lr}, score=s) for n, lr, s in ((1, 1, 5.0), (1, 2, 7.0), (2, 1, 6.0))
    ]
    heads += [HeadScore(settings={"layers": [1, 2]}, score=99.0), HeadScore(settings={"layer": 2}, score=None)]
    points = sweep_points([make_record(heads=tuple(heads))], "layers")
    assert [(p.x, p.name, p.value, p.metric) for p in points] == [
        (1.0, "1", 7.0, "held-out accuracy"), (2.0, "2", 6.0, "held-out accuracy"),
    ]  # fmt: skip
    assert sweep_points([make_record(heads=tuple(heads[:2]))], "layers") == []


def test_resolutions_and_files():
    records = []
    for side, tokens, value in ((448, 1024.0, 70.0), (224, 256.0, 60.0)):
        cost = Cost(params=1, flops=None, tokens_per_image=tokens, images_per_second=None, forwards=0)
        view = f"square={side}"
        records.append(make_record(value=value, settings={"view": view}, view=view, cost=cost))
    points = sweep_points(records, "resolution")
    assert [(p.x, p.name) for p in points] == [(256.0, "square=224"), (1024.0, "square=448")]
    rows = list(csv.DictReader(io.StringIO(sweep_csv(points))))
    assert [row["value"] for row in rows] == ["60.0", "70.0"]
    assert rows[0]["sd"] == ""
    assert [json.loads(line)["x"] for line in sweep_json(points).splitlines()] == [256.0, 1024.0]


RUN = {
    "dataset": "scenes", "options": {"n_train": 16, "n_val": 4, "size": 64}, "view": "square=56",
    "protocols": ["gram-lda"], "settings": {"shrinkages": (0.1,)}, "show_progress": False,
}  # fmt: skip


@pytest.mark.slow
def test_a_sweep_over_labels_reads_one_bank(tmp_path: Path):
    from rice_eval.sweep import sweep

    options = {"bank": tmp_path / "bank", "panels": 0, "resamples": 50, "workers": 0}
    done = sweep("labels", ["rgb-moments"], ["1/4", "all"], seeds=2, results=tmp_path / "r", run_options=options, **RUN)
    records = [result.record for result in done]
    assert sum(record.cost.forwards for record in records) == 20
    assert len({record.bank.keys for record in records}) == 1
    assert [r.protocol.settings.get("labels") for r in records] == ["1/4", "1/4", None]
    assert records[0].warnings[0].startswith("trained on 4 of 16 images: labels 1/4, split 0, ids' sha256 ")
    assert [(p.name, p.runs) for p in sweep_points(records, "labels")] == [("1/4", 2), ("all", 1)]
    for values, said in ((["1/4", "1/4"], "each value once"), (["3"], "no share")):
        with pytest.raises(UsageError, match=said):
            sweep("labels", ["rgb-moments"], values, results=tmp_path / "r", run_options=options, **RUN)
    with pytest.raises(UsageError, match="no field 'labels'"):
        sweep(
            "labels",
            ["rgb-moments"],
            results=tmp_path / "r",
            run_options=options,
            **{**RUN, "protocols": ["capi-knn"], "settings": {}},
        )
    with pytest.raises(UsageError, match="no sweep over"):
        sweep("widths", ["rgb-moments"], **RUN)


@pytest.mark.slow
def test_sweeps_over_layers_and_resolutions(tmp_path: Path):
    from rice_eval.sweep import sweep

    options = {"bank": tmp_path / "bank", "panels": 0, "resamples": 50, "workers": 0}
    run = {**RUN, "view": "square=64"}
    (one,) = sweep("layers", ["mobilenet-v2"], results=tmp_path / "r", run_options=options, **run)
    assert len(sweep_points([one.record], "layers")) == one.record.encoder.layers
    run = {k: v for k, v in RUN.items() if k != "view"}
    done = sweep(
        "resolution", ["rgb-moments"], ["square=28", "square=56"], results=tmp_path / "r", run_options=options, **run
    )
    assert [p.name for p in sweep_points([d.record for d in done], "resolution")] == ["square=28", "square=56"]
