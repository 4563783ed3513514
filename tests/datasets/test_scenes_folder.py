"""``data make scenes``: COCO files that pycocotools reads back, whole or not at all, and the reader of such a folder."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from rice_eval.datasets import load_dataset
from rice_eval.datasets.scenes import Scenes
from rice_eval.datasets.scenes_folder import ScenesFolder
from rice_eval.datasets.scenes_write import write_scenes
from rice_eval.errors import DataError, UsageError

SIZE, SEED = 96, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "set", 3, 4, SIZE, SEED)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_instances_read_back_through_pycocotools(made: Path) -> None:
    coco = COCO(str(made / "annotations" / "instances_val.json"))
    truth = Scenes("val", 4, SIZE, SEED)
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(truth.things)
    assert len(coco.getImgIds()) == 4
    for index in coco.getImgIds():
        scene = truth.scene(index)
        picture = np.asarray(Image.open(made / "val" / coco.loadImgs(index)[0]["file_name"]))
        np.testing.assert_array_equal(picture, scene.image)
        entries = coco.loadAnns(coco.getAnnIds(imgIds=index))
        assert len(entries) == len(scene.objects)
        for entry, thing in zip(entries, scene.objects):
            mask = coco.annToMask(entry).astype(bool)
            np.testing.assert_array_equal(mask, scene.owner == thing.owner)
            assert entry["area"] == mask.sum()
            x, y, w, h = entry["bbox"]
            rows, columns = np.nonzero(mask)
            assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert entry["id"] > 0


def test_panoptic_pngs_hold_the_segments(made: Path) -> None:
    panoptic = json.loads((made / "annotations" / "panoptic_val.json").read_text())
    by_id = {c["id"]: c for c in panoptic["categories"]}
    instances = COCO(str(made / "annotations" / "instances_val.json"))
    truth = Scenes("val", 4, SIZE, SEED)
    for entry in panoptic["annotations"]:
        picture = np.asarray(Image.open(made / "annotations" / "panoptic_val" / entry["file_name"])).astype(int)
        ids = picture[..., 0] + 256 * picture[..., 1] + 65536 * picture[..., 2]
        assert {s["id"] for s in entry["segments_info"]} == set(np.unique(ids).tolist())
        names = np.empty(ids.shape, object)
        for segment in entry["segments_info"]:
            mask = ids == segment["id"]
            assert segment["area"] == mask.sum()
            names[mask] = by_id[segment["category_id"]]["name"]
            if by_id[segment["category_id"]]["isthing"]:
                other = instances.annToMask(instances.anns[segment["id"]]).astype(bool)
                np.testing.assert_array_equal(mask, other)
        semantic = np.array(truth.classes, object)[truth.semantic(entry["image_id"])]
        assert (names == semantic).all()


def test_bytes_repeat(made: Path, tmp_path: Path) -> None:
    again = write_scenes(tmp_path / "again", 3, 4, SIZE, SEED)
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert len(files) == 1 + 2 * 5 + 7 * 4
    for name in files:
        assert (made / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize("split", ["train", "val"])
def test_folder_gives_what_memory_gives(made: Path, split: str) -> None:
    read = load_dataset("scenes", split, made, {"size": SIZE, "seed": SEED})
    fresh = Scenes(split, len(read), SIZE, SEED)
    assert isinstance(read, ScenesFolder)
    for name in ("fingerprint", "classes", "things", "palette", "provides", "name", "split"):
        assert getattr(read, name) == getattr(fresh, name)
    for index in range(len(read)):
        assert read.image_id(index) == fresh.image_id(index)
        for kind in ("image", "semantic", "depth"):
            ours, theirs = getattr(read, kind)(index), getattr(fresh, kind)(index)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        a, b = read.instances(index), fresh.instances(index)
        assert (a.masks, a.names) == (b.masks, b.names)
        for kind in ("boxes", "labels", "crowd", "area", "ids"):
            np.testing.assert_array_equal(getattr(a, kind), getattr(b, kind))
        for mine, other in zip(read.text(index), fresh.text(index), strict=True):
            np.testing.assert_array_equal(mine.polygon, other.polygon)
            assert (mine.text, mine.ignore) == (other.text, other.ignore)
        assert read.questions(index) == fresh.questions(index)
        here, there = read.points(index), fresh.points(index)
        for kind in ("other", "here", "there"):
            np.testing.assert_array_equal(getattr(here, kind), getattr(there, kind))


def test_first_n_of_a_folder(made: Path) -> None:
    assert ScenesFolder(made, "val", n=2).fingerprint == Scenes("val", 2, SIZE, SEED).fingerprint
    with pytest.raises(UsageError, match="5 scenes of split 'val' asked for, 4 there"):
        ScenesFolder(made, "val", n=5)
    with pytest.raises(UsageError, match="made with size 96, not 224"):
        load_dataset("scenes", "val", made, {"size": 224})
    with pytest.raises(UsageError, match="no split 'test'"):
        ScenesFolder(made, "test")


def test_altered_or_missing_files_are_named(copy: Path) -> None:
    picture = copy / "val" / "000001.png"
    data = ScenesFolder(copy, "val")
    picture.write_bytes(picture.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"000001\.png: its checksum"):
        data.image(1)
    picture.unlink()
    with pytest.raises(DataError, match=r"000001\.png: can't be read"):
        data.image(1)
    (copy / "annotations" / "instances_val.json").unlink()
    with pytest.raises(DataError, match="instances_val.json"):
        ScenesFolder(copy, "val")
    (copy / "scenes.json").write_text("{")
    with pytest.raises(DataError, match=r"scenes\.json: not valid JSON"):
        ScenesFolder(copy, "val")
    (copy / "scenes.json").write_text("[]")
    with pytest.raises(DataError, match="is not the manifest"):
        ScenesFolder(copy, "val")
    with pytest.raises(DataError, match=r"scenes\.json: can't be read"):
        ScenesFolder(copy / "nowhere", "val")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def full(split: str, done: int, total: int) -> None:
        if split == "val":
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        write_scenes(tmp_path / "set", 1, 1, 64, progress=full)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not an empty folder") as caught:
        write_scenes(tmp_path, 1, 1, 64)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UsageError, match="0 scenes of split 'val'"):
        write_scenes(tmp_path / "new", 1, 0, 64)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (write_scenes(empty, 1, 1, 64) / "scenes.json").is_file()
