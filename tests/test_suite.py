"""Roboflow 100: means of made scores, and a synthetic export of three sets of which one is broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rice_eval.cli.main import main
from rice_eval.datasets.roboflow import categories
from rice_eval.suite import category_means


def write_set(root: Path, name: str, images: int = 3) -> None:
    rng = np.random.default_rng(len(name))
    for split in ("train", "valid", "test"):
        folder = root / name / split
        folder.mkdir(parents=True)
        entries, anns = [], []
        for i in range(1, images + 1):
            picture = np.full((56, 56, 3), 90, np.uint8)
            x, y = (int(v) for v in rng.integers(0, 30, 2))
            picture[y : y + 24, x : x + 24] = 230
            Image.fromarray(picture).save(folder / f"{i}.jpg")
            entries.append({"id": i, "file_name": f"{i}.jpg", "height": 56, "width": 56})
            anns.append({"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, 24, 24], "area": 576, "iscrowd": 0})
        content = {"images": entries, "annotations": anns, "categories": [{"id": 1, "name": "box"}]}
        (folder / "_annotations.coco.json").write_text(json.dumps(content))


def test_means_are_plain_means():
    names = categories()
    first, second = list(names)[:2]
    scores = {names[first][0]: 10.0, names[first][1]: 30.0, names[second][0]: 50.0}
    assert category_means(scores) == {first: 20.0, second: 50.0, "mean": 35.0}


def test_a_broken_set_is_named_and_the_rest_goes_on(tmp_path, capsys):
    names = categories()
    first, second = list(names)[:2]
    good = [names[first][0], names[second][0]]
    broken = names[first][1]
    for name in (*good, broken):
        write_set(tmp_path / "rf", name)
    (tmp_path / "rf" / broken / "test" / "_annotations.coco.json").write_text('{"images": [')
    command = [
        "detection",
        "-e",
        "rgb-moments",
        "-d",
        "roboflow100",
        "--data",
        str(tmp_path / "rf"),
        "--view",
        "square=56",
    ]
    command += ["--set", "steps=3", "--set", "lrs=0.01", "--results", str(tmp_path / "out"), "--no-report", "--json"]
    command += ["--bank", str(tmp_path / "bank"), "--workers", "0"]
    with pytest.raises(SystemExit) as end:
        sys.exit(main(command))
    said = capsys.readouterr()
    assert not end.value.code, said.err
    assert f"set {broken}:" in said.err
    summary = json.loads((tmp_path / "out" / "roboflow100.json").read_text())
    (scores,) = summary["scores"]
    assert set(scores["sets"]) == set(good)
    assert broken in summary["broken"]
    (means,) = summary["means"]
    assert means["mean"] == pytest.approx(np.mean(list(scores["sets"].values())))
    assert json.loads(said.out.splitlines()[-1])["sets"] == 2


def test_a_plan_that_is_wrong_stops_at_once(tmp_path, capsys):
    write_set(tmp_path / "rf", next(iter(categories().values()))[0])
    command = [
        "detection",
        "-e",
        "rgb-moments",
        "-d",
        "roboflow100",
        "--data",
        str(tmp_path / "rf"),
        "--view",
        "square=57",
    ]
    with pytest.raises(SystemExit) as end:
        sys.exit(main([*command, "--results", str(tmp_path / "out"), "--bank", str(tmp_path / "bank")]))
    assert end.value.code == 2
    assert "square=56" in capsys.readouterr().err
