"""Pictures of the images that changed most: which are drawn, and what is said of those that can't be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from result_factory import put, shifted

from rice_eval.cli.main import main
from rice_eval.report.panel_files import panels_folder, save_panels
from rice_eval.report.panels import PanelPicture, Tile


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def panels_of(*images: int) -> list[PanelPicture]:
    pixels = np.full((24, 24, 3), 90, dtype=np.uint8)
    tiles = (Tile("image", pixels), Tile("truth", pixels), Tile("prediction", pixels))
    return [PanelPicture(f"i{k}", k, tiles) for k in images]


def two_records(tmp_path: Path, *panels: int) -> tuple[Path, Path]:
    statistics = shifted(0, n=50)
    for image, loss in ((7, 3.0), (30, 2.0), (11, 1.0)):
        statistics.numerators[image] -= loss
    records = put(tmp_path / "a", shifted(0, n=50)), put(tmp_path / "b", statistics, encoder="b")
    for record in records if panels else ():
        save_panels(panels_folder(record.path), panels_of(*panels))
    return records[0].path, records[1].path


def test_the_images_that_changed_most_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_records(tmp_path, 0, 7, 11, 30)
    assert run("compare", a, b, "--panels", tmp_path / "moved", "--json") == 0
    out = capsys.readouterr()
    files = [Path(p).name for p in json.loads(out.out)[0]["panels"]]
    assert [name.split("-")[-2:] for name in files] == [
        ["0001", "i7.png"], ["0002", "i30.png"], ["0003", "i11.png"], ["0004", "i0.png"]
    ]  # fmt: skip
    assert Image.open(tmp_path / "moved" / files[0]).width > 4 * 24
    assert out.err == ""


def test_images_without_a_picture_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_records(tmp_path, 0, 11)
    assert run("compare", a, b, "--panels", tmp_path / "moved") == 0
    error = capsys.readouterr().err
    assert "no picture of 2 of the images that changed most (i7, i30)" in error
    assert "--panels 50" in error
    assert sorted(p.name.split("-")[-2] for p in (tmp_path / "moved").iterdir()) == ["0003", "0004"]


def test_records_without_any_picture_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_records(tmp_path)
    assert run("compare", a, b, "--panels", tmp_path / "moved") == 0
    assert "no picture of 3" in capsys.readouterr().err
    assert not (tmp_path / "moved").exists()
