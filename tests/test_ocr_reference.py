"""The reference row: a system that knows the truth scores 100 %, one that reads nothing 0, and neither becomes a record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rice_eval.datasets.scenes_text_set import ScenesText
from rice_eval.errors import DataError, PlanError
from rice_eval.ocr_reference import evaluate_reference

OPTIONS = {"n_train": 1, "n_val": 2, "size": 256}


class Oracle:
    name = "oracle"

    def __init__(self) -> None:
        data = ScenesText("val", 2, size=256)
        self.pages = {data.image(i).tobytes(): data.text(i) for i in range(2)}
        self.searched = 0
        self.lines = iter([line.text for i in range(2) for line in data.text(i)])

    def page(self, image: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
        self.searched += 1
        lines = self.pages[image.tobytes()]
        return [line.polygon for line in lines], [line.text for line in lines]

    def line(self, crop: np.ndarray) -> str:
        return next(self.lines)


class Blind:
    name = "blind"

    def page(self, image: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
        return [], []

    def line(self, crop: np.ndarray) -> str:
        return ""


def test_rows_of_an_oracle_and_a_blind_system(tmp_path: Path):
    oracle = Oracle()
    lines, regions, pages = evaluate_reference(oracle, options=OPTIONS, results=tmp_path, panels=1, resamples=50)
    assert oracle.searched == 2  # two protocols look at both pages
    assert regions.metrics["hmean"][0] == regions.metrics["text_iou"][0] == 100
    assert lines.metrics["word_accuracy_exact"][0] == 100
    assert pages.metrics["hmean"][0] == pages.metrics["spotting"][0] == 100
    assert pages.metrics["cer"][0] == 0
    row = json.loads(lines.path.read_text())
    assert row["reference"] is True
    assert row["groups"]["one_minus_ned"].keys() >= row["group_intervals"]["one_minus_ned"].keys()
    lines, regions, pages = evaluate_reference(Blind(), options=OPTIONS, results=tmp_path, panels=0, resamples=50)
    assert lines.metrics["one_minus_ned"][0] == 0
    assert pages.metrics["cer"][0] == 100
    assert regions.metrics["recall"][0] == 0
    assert not (tmp_path / "records").exists()


def test_other_protocols_are_refused(tmp_path: Path):
    with pytest.raises(PlanError, match="zero-shot-words"):
        evaluate_reference(Blind(), options=OPTIONS, protocols=("zero-shot-words",), results=tmp_path)


def test_nothing_to_read_and_damaged_images_are_one_sentence(tmp_path: Path):
    for name, text in (("0", ""), ("1", "")):
        for part, suffix in (("img", "png"), ("box", "csv")):
            (tmp_path / "val" / part).mkdir(parents=True, exist_ok=True)
            path = tmp_path / "val" / part / f"{name}.{suffix}"
            Image.new("RGB", (40, 20)).save(path) if part == "img" else path.write_text(text)
    for protocol, words in (("ctc-linear", "no test image has a legible line"), ("read-page", "nothing to divide by")):
        with pytest.raises(DataError, match=words):
            evaluate_reference(Blind(), dataset="sroie", data=tmp_path, protocols=(protocol,), results=tmp_path / "r")
    (tmp_path / "val" / "img" / "1.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"1.png: can't be decoded .*a reference leaves no image out"):
        evaluate_reference(Blind(), dataset="sroie", data=tmp_path, protocols=("read-page",), results=tmp_path / "r")
    assert not (tmp_path / "r" / "references").exists()
