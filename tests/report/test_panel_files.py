"""Panels on disk."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rice_eval.errors import RecordError
from rice_eval.report import panel_files
from rice_eval.report.panel_files import INDEX, load_panels, panels_folder, save_panels

from .factory import scene_panels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_panels(panels_folder(tmp_path / "linear-1.json"), scene_panels(2, 0.5, 8, 0))


def test_panels_come_back(folder: Path) -> None:
    assert folder.name == "linear-1.panels"
    panels = scene_panels(2, 0.5, 8, 0)
    loaded = load_panels(folder)
    assert [(p.image_id, p.index, p.note) for p in loaded] == [(p.image_id, p.index, p.note) for p in panels]
    for stored, made in zip(loaded, panels, strict=True):
        assert [e.name for e in stored.legend] == [e.name for e in made.legend]
        for tile, source in zip(stored.tiles, made.tiles, strict=True):
            picture = np.asarray(Image.open(io.BytesIO(tile.data)).convert("RGB"))
            assert picture.shape == source.picture.shape == (tile.height, tile.width, 3)
            if source.flat:
                assert np.array_equal(picture, source.picture)
            else:
                assert np.abs(picture.astype(int) - source.picture).mean() < 12


def test_same_panels_give_the_same_bytes_and_replace_what_was_there(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "stale.webp").write_bytes(b"x")
    save_panels(folder, scene_panels(2, 0.5, 8, 0))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_no_panels_file_looks_like_a_record(folder: Path) -> None:
    assert not list(folder.rglob("*.json"))


def test_a_write_that_fails_leaves_the_old_panels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.setattr(panel_files, "_write", fail)
    with pytest.raises(RecordError, match="No space left on device.*free some space"):
        save_panels(folder, scene_panels(1, 0.5, 8, 0))
    assert sorted(p.name for p in folder.iterdir()) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_folder_without_an_index_counts_for_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).unlink()
    assert load_panels(folder) == []
    assert load_panels(tmp_path / "none") == []


def test_damage_is_named(folder: Path) -> None:
    picture = folder / "0000-truth.webp"
    data = picture.read_bytes()
    picture.write_bytes(data[:-3])
    with pytest.raises(RecordError, match=r"0000-truth\.webp is not the picture"):
        load_panels(folder)
    picture.unlink()
    with pytest.raises(RecordError, match=r"0000-truth\.webp can't be read"):
        load_panels(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 2, "format"),
        ("extra", 1, "extra"),
        ("tiles", [{"role": "image", "file": "../../etc/passwd", "width": 1, "height": 1, "sha256": ""}], "file"),
    ],
)
def test_an_index_of_another_kind_is_refused(folder: Path, field: str, value: object, message: str) -> None:
    lines = (folder / INDEX).read_text().splitlines()
    (folder / INDEX).write_text(json.dumps({**json.loads(lines[0]), field: value}) + "\n" + lines[1])
    with pytest.raises(RecordError, match=message):
        load_panels(folder)
