"""Segmentation readers on tiny copies of the real layouts, and on every fault a copy may have."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from rice_eval.datasets import load_dataset
from rice_eval.datasets.base import IGNORE, Dataset, decode_image, files_fingerprint
from rice_eval.datasets.rasters import upright_size
from rice_eval.datasets.segmentation import class_table
from rice_eval.errors import DataError, RiceEvalError, UsageError

H, W = 4, 6


def picture(path: Path, mode: str = "RGB", **save: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    rgb = np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)
    Image.fromarray(rgb).convert(mode).save(path, **save)


def index_map(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def filled(*values: int) -> np.ndarray[Any, Any]:
    """A map of H x W that cycles through the values."""
    return np.resize(np.array(values), (H, W))


def ade20k(root: Path) -> Path:
    base = root / "ADEChallengeData2016"
    for split, names in (
        ("training", ("ADE_train_00000001", "ADE_train_00000002")),
        ("validation", ("ADE_val_00000001",)),
    ):
        for name in names:
            picture(base / "images" / split / f"{name}.jpg")
            index_map(base / "annotations" / split / f"{name}.png", filled(0, 1, 150, 4))
    return root


def voc(root: Path) -> Path:
    base = root / "VOCdevkit" / "VOC2012"
    for name in ("2007_000001", "2007_000002", "2008_000003", "2008_000004"):
        picture(base / "JPEGImages" / f"{name}.jpg")
    palette = [c for i in range(256) for c in (i, 255 - i, 7)]
    for name in ("2007_000001", "2007_000002"):
        image = Image.new("P", (W, H))
        image.putdata([int(v) for v in filled(0, 1, 20, 255).ravel()])
        image.putpalette(palette)
        (base / "SegmentationClass").mkdir(exist_ok=True)
        image.save(base / "SegmentationClass" / f"{name}.png")
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000001\n")
    (lists / "val.txt").write_text("2007_000002\n")
    (lists / "trainval.txt").write_text("2007_000001\n2007_000002\n")
    return root


def cityscapes(root: Path) -> Path:
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "munster")):
        stem = f"{city}_000000_000019"
        picture(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        truth = root / "gtFine" / split / city
        index_map(truth / f"{stem}_gtFine_labelIds.png", filled(0, 7, 33, 30, 255, 11))
        index_map(truth / f"{stem}_gtFine_labelTrainIds.png", filled(255, 0, 18, 255, 255, 2))
        index_map(truth / f"{stem}_gtFine_instanceIds.png", filled(1))
    return root


def coco_stuff(root: Path) -> Path:
    for split in ("train2017", "val2017"):
        for number in (9, 25):
            picture(root / split / f"{number:012d}.jpg")
            index_map(root / "stuffthingmaps" / split / f"{number:012d}.png", filled(0, 10, 12, 89, 91, 181, 255))
    return root


def context(root: Path) -> Path:
    base = root / "VOCdevkit" / "VOC2010"
    for name in ("2008_000001", "2008_000002"):
        picture(base / "JPEGImages" / f"{name}.jpg")
        index_map(base / "SegmentationClassContext" / f"{name}.png", filled(0, 1, 59))
    lists = base / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_000001\n")
    (lists / "val.txt").write_text("2008_000002\n")
    return root


def folder(root: Path) -> Path:
    for name in ("a", "deep/b"):
        picture(root / "images" / "val" / f"{name}.png")
        index_map(root / "masks" / "val" / f"{name}.png", filled(0, 1, 2, 255))
    (root / "names.txt").write_text("road\nsky\nnever seen\n")
    return root


def read(name: str, split: str, root: Path, **options: Any) -> Dataset:
    return load_dataset(name, split, root, options)


LAYOUTS: list[tuple[str, Callable[[Path], Path], str, int, list[int]]] = [
    ("ade20k", ade20k, "training", 150, [IGNORE, 0, 149, 3]),
    ("voc2012", voc, "val", 21, [0, 1, 20, IGNORE]),
    ("cityscapes", cityscapes, "train", 19, [IGNORE, 0, 18, IGNORE, IGNORE, 2]),
    ("coco-stuff", coco_stuff, "val2017", 171, [0, 10, 11, 79, 80, 170, IGNORE]),
    ("pascal-context", context, "val", 59, [IGNORE, 0, 58]),
    ("folder", folder, "val", 3, [0, 1, 2, IGNORE]),
]


@pytest.mark.parametrize(("name", "write", "split", "count", "want"), LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_layout(
    tmp_path: Path, name: str, write: Callable[[Path], Path], split: str, count: int, want: list[int]
) -> None:
    data = read(name, split, write(tmp_path / "data"))
    assert len(data.classes) == len(data.palette) == count
    assert data.provides == {"semantic"}
    assert len({data.image_id(i) for i in range(len(data))}) == len(data)
    for index in range(len(data)):
        assert np.array_equal(data.semantic(index), filled(*want))
        assert data.image(index).shape == (H, W, 3)
        assert data.size(index) == (H, W)
    # The same from one zip and from one tar of the folder, compressed or not, and in another process.
    archives = [tmp_path / "data.zip", tmp_path / "data.tar", tmp_path / "data.tgz"]
    with zipfile.ZipFile(archives[0], "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted((tmp_path / "data").rglob("*")):
            zipped.write(path, path.relative_to(tmp_path))
    for path, mode in zip(archives[1:], ("w:", "w:gz")):
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            tar.add(tmp_path / "data", "./data")
    for path in archives:
        packed = pickle.loads(pickle.dumps(read(name, split, path)))
        assert packed.fingerprint == data.fingerprint, path.name
        assert [packed.image_id(i) for i in range(len(packed))] == [data.image_id(i) for i in range(len(data))]
        assert np.array_equal(packed.image(len(packed) - 1), data.image(len(data) - 1))
        assert np.array_equal(packed.semantic(0), data.semantic(0))


@pytest.mark.parametrize(("name", "write", "split", "count", "want"), LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_missing_mask_and_missing_image_are_named(
    tmp_path: Path, name: str, write: Callable[[Path], Path], split: str, count: int, want: list[int]
) -> None:
    root = write(tmp_path)
    data: Any = read(name, split, root)
    mask, image = Path(data.storage.label(data.masks[0])), Path(data.storage.label(data.images[0]))
    kept = mask.read_bytes()
    mask.unlink()
    with pytest.raises(DataError, match=data.image_id(0).removesuffix("_leftImg8bit")) as caught:
        read(name, split, root)
    assert "mask" in str(caught.value) or "holds no" in str(caught.value) or "not there" in str(caught.value)
    mask.write_bytes(kept)
    image.unlink()
    with pytest.raises(DataError) as caught:
        read(name, split, root)
    assert "\n" not in str(caught.value)


def test_cityscapes_train_ids_are_the_same_classes(tmp_path: Path) -> None:
    root = cityscapes(tmp_path)
    ours, theirs = read("cityscapes", "train", root), read("cityscapes", "train", root, labels="labelTrainIds")
    assert np.array_equal(ours.semantic(1), theirs.semantic(1))


def test_from_the_archives_as_shipped(tmp_path: Path) -> None:
    city = cityscapes(tmp_path / "city")
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for name in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(shipped / f"{name}_trainvaltest.zip", "w") as archive:
            archive.writestr("README", "read me")
            for path in sorted((city / name).rglob("*.png")):
                archive.write(path, path.relative_to(city))
    assert read("cityscapes", "train", shipped).fingerprint == read("cityscapes", "train", city).fingerprint
    stuff = coco_stuff(tmp_path / "stuff")
    want = read("coco-stuff", "val2017", stuff).fingerprint
    with zipfile.ZipFile(stuff / "stuffthingmaps_trainval2017.zip", "w") as archive:
        for path in sorted((stuff / "stuffthingmaps").rglob("*.png")):
            archive.write(path, path.relative_to(stuff / "stuffthingmaps"))
            path.unlink()
    data = read("coco-stuff", "val2017", stuff)
    assert data.fingerprint == want
    assert np.array_equal(data.semantic(1), filled(0, 10, 11, 79, 80, 170, IGNORE))


def test_coco_stuff_converted_labels_and_the_gaps(tmp_path: Path) -> None:
    root = tmp_path
    for split in ("train2017", "val2017"):
        picture(root / "images" / split / "000000000009.jpg")
        index_map(root / "annotations" / split / "000000000009.png", filled(0, 12, 181))
        index_map(root / "annotations" / split / "000000000009_labelTrainIds.png", filled(0, 11, 170))
    plain, converted = read("coco-stuff", "val2017", root), read("coco-stuff", "val2017", root, labels="trainIds")
    assert np.array_equal(plain.semantic(0), converted.semantic(0))
    index_map(root / "annotations" / "val2017" / "000000000009.png", filled(0, 11))  # id 12, street sign: never used
    with pytest.raises(DataError, match=r"value 11 .* belongs to no class; allowed: 0-10, 12-24, 26-27, 30-43"):
        read("coco-stuff", "val2017", root).semantic(0)


def test_context_with_background(tmp_path: Path) -> None:
    root = context(tmp_path)
    for classes in (60, "60"):
        data = read("pascal-context", "val", root, classes=classes)
        assert data.classes[0] == "background"
        assert np.array_equal(data.semantic(0), filled(0, 1, 59))
    with pytest.raises(UsageError, match="classes"):
        read("pascal-context", "val", root, classes=33)


def _sbd(root: Path, where: str) -> None:
    from scipy.io import savemat

    base = root / where
    (base / "cls").mkdir(parents=True)
    for name in ("2007_000001", "2007_000002", "2008_000003", "2008_000004"):
        struct = {"Segmentation": filled(3, 0).astype(np.uint8), "Boundaries": np.zeros(3), "CategoriesPresent": 3}
        savemat(base / "cls" / f"{name}.mat", {"GTcls": struct})
    (base / "train.txt").write_text("2008_000004\n2007_000001\n2007_000002\n")
    (base / "val.txt").write_text("2008_000003\n")


@pytest.mark.parametrize("where", ["benchmark_RELEASE/dataset", "VOCdevkit/VOCaug/dataset"])
def test_trainaug_from_sbd_mat_files(tmp_path: Path, where: str) -> None:
    pytest.importorskip("scipy")
    root = voc(tmp_path)
    _sbd(root, where)
    data = read("voc2012", "trainaug", root)
    # Train first, with VOC's own maps; then SBD's images that are not in val, never the image of val.
    assert [data.image_id(i) for i in range(len(data))] == ["2007_000001", "2008_000003", "2008_000004"]
    assert np.array_equal(data.semantic(0), filled(0, 1, 20, IGNORE))
    assert np.array_equal(data.semantic(1), filled(3, 0))
    mat = root / where / "cls" / "2008_000003.mat"
    mat.write_bytes(mat.read_bytes()[:100])
    with pytest.raises(DataError, match="2008_000003.mat: not a class map of SBD"):
        data.semantic(1)


def test_trainaug_from_pngs_and_without_sbd(tmp_path: Path) -> None:
    root = voc(tmp_path)
    with pytest.raises(DataError, match="no labels of SBD"):
        read("voc2012", "trainaug", root)
    base = root / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("2008_000004\n2007_000001\n2008_000003\n")
    for name in ("2008_000004", "2008_000003"):
        index_map(base / "SegmentationClassAug" / f"{name}.png", filled(5))
    data = read("voc2012", "trainaug", base)
    assert [data.image_id(i) for i in range(len(data))] == ["2007_000001", "2008_000004", "2008_000003"]
    assert (data.semantic(2) == 5).all()


# Faults of single files, on the generic layout.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path)


def test_mask_of_another_size(root: Path) -> None:
    index_map(root / "masks" / "val" / "a.png", np.zeros((H, W + 1)))
    with pytest.raises(DataError, match="a.png: 7x4 pixels, but its image has 6x4"):
        read("folder", "val", root).semantic(0)


@pytest.mark.parametrize("value", [3, 254])
def test_label_outside_the_range(root: Path, value: int) -> None:
    index_map(root / "masks" / "val" / "a.png", filled(0, value))
    with pytest.raises(DataError, match=rf"value {value} \(12 pixels out of range\) .* allowed: 0-2, 255"):
        read("folder", "val", root).semantic(0)


def test_negative_values_are_out_of_range(root: Path) -> None:
    for name in ("a", "deep/b"):
        (root / "masks" / "val" / f"{name}.png").unlink()
        Image.fromarray(np.full((H, W), -1, dtype=np.int32)).save(root / "masks" / "val" / f"{name}.tif")
    with pytest.raises(DataError, match=r"value -1 \(24 pixels out of range\)"):
        read("folder", "val", root, mask_suffix=".tif").semantic(0)


def test_a_photo_in_a_damaged_part_of_a_zip(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root).as_posix())
        info = archive.getinfo("images/val/a.png")
    content = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    content[start : start + 8] = bytes(b ^ 255 for b in content[start : start + 8])
    path.write_bytes(content)
    with pytest.raises(DataError, match="images/val/a.png: can't be decoded"):
        read("folder", "val", path).size(0)


def test_16_bit_palette_and_low_depth_maps_hold_indices(root: Path) -> None:
    target = root / "masks" / "val" / "a.png"
    data = read("folder", "val", root)
    Image.fromarray(filled(0, 1, 2, 255).astype(np.uint16)).save(target)
    assert np.array_equal(data.semantic(0), filled(0, 1, 2, IGNORE))
    Image.fromarray(filled(0, 1, 2, 65535).astype(np.uint16)).save(target)
    with pytest.raises(DataError, match="value 65535"):
        data.semantic(0)
    for bits, values in ((1, (0, 1)), (2, (0, 1, 2)), (4, (0, 1, 2)), (8, (0, 1, 2, 255))):
        image = Image.new("P", (W, H))
        image.putdata([int(v) for v in filled(*values).ravel()])
        image.putpalette([c for i in range(2**bits) for c in (200 - i % 200, 9, i)])
        image.save(target, bits=bits)
        assert np.array_equal(data.semantic(0), np.where(filled(*values) == 255, IGNORE, filled(*values)))
    Image.fromarray(filled(0, 1).astype(bool)).save(target)
    assert np.array_equal(data.semantic(0), filled(0, 1))


@pytest.mark.parametrize("depth", [2, 4])
def test_low_depth_grayscale_is_not_stretched(root: Path, depth: int) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b""
    for row in filled(0, 1, 2):
        bits = "".join(f"{int(value):0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", W, H, depth, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (root / "masks" / "val" / "a.png").write_bytes(png)
    assert np.array_equal(read("folder", "val", root).semantic(0), filled(0, 1, 2))


def test_colour_mask_and_damaged_mask(root: Path) -> None:
    target = root / "masks" / "val" / "a.png"
    whole = target.read_bytes()
    picture(target)
    with pytest.raises(DataError, match=r"a colour picture \(mode RGB\), not a map of class indices"):
        read("folder", "val", root).semantic(0)
    target.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="a.png: can't be decoded"):
        read("folder", "val", root).semantic(0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_size_from_the_header_is_that_of_the_picture(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    written = io.BytesIO()
    Image.new("RGB", (12, 8)).save(written, kind, exif=exif)
    assert upright_size(io.BytesIO(written.getvalue()), "a") == decode_image(written.getvalue(), "a").shape[:2]


def test_a_photo_with_damaged_exif_is_one_line() -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a photo", 6
    written = io.BytesIO()
    Image.new("RGB", (8, 8)).save(written, "JPEG", exif=exif)
    damaged = bytearray(written.getvalue())
    damaged[damaged.index(b"Exif") + 17] = 0  # the tag's type: Pillow stumbles over it in struct
    with pytest.raises(DataError, match=r"a\.jpg: can't be decoded"):
        decode_image(bytes(damaged), "a.jpg")


def test_file_names_need_not_be_utf8() -> None:
    names = ["caf\udce9.jpg", "café.jpg"]
    assert len({files_fingerprint([(name, b"1")], {}) for name in names}) == 2


def test_exif_rotated_photo(root: Path) -> None:
    (root / "images" / "val" / "a.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "images" / "val" / "a.jpg", exif=exif, quality=95)
    data = read("folder", "val", root)
    assert data.size(0) == (W, H)
    assert data.image(0).shape == (W, H, 3)
    with pytest.raises(DataError, match="lies in the image's stored orientation; turn the mask upright"):
        data.semantic(0)
    index_map(root / "masks" / "val" / "a.png", filled(0, 1, 2).T)
    assert data.semantic(0).shape == data.image(0).shape[:2]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grayscale_and_cmyk_photos(root: Path, mode: str) -> None:
    (root / "images" / "val" / "a.png").unlink()
    picture(root / "images" / "val" / "a.jpg", mode, quality=95)
    data = read("folder", "val", root)
    want = np.asarray(Image.open(root / "images" / "val" / "a.jpg").convert("RGB"))
    assert np.array_equal(data.image(0), want)
    assert data.semantic(0).shape == (H, W)


def test_a_class_absent_from_val_keeps_its_place(root: Path) -> None:
    for name in ("a.png", "deep/b.png"):
        index_map(root / "masks" / "val" / name, filled(0, 1))
    data = read("folder", "val", root)
    assert data.classes == ("road", "sky", "never seen")
    assert set(np.unique(data.semantic(0))) == {0, 1}


def test_truncated_photo(root: Path) -> None:
    path = root / "images" / "val" / "a.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="a.png: can't be decoded"):
        read("folder", "val", root).image(0)


def test_a_mask_without_its_image(root: Path) -> None:
    index_map(root / "masks" / "val" / "z.png", filled(0))
    with pytest.raises(DataError, match=r"z.png: a mask with no image \(1 of 3\)"):
        read("folder", "val", root)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("[", "not valid JSON"),
        ("3", "neither a list of names"),
        ('"road"', "neither a list of names"),
        ('{"a": "road"}', "neither a list of names"),
        ('["road", "road"]', "two classes are named 'road'"),
        ('["road", ""]', "needs one name a class"),
        ("[]", "needs one name a class"),
    ],
)
def test_malformed_names(root: Path, names: str, says: str) -> None:
    (root / "names.txt").unlink()
    (root / "names.json").write_text(names)
    with pytest.raises(DataError, match=says):
        read("folder", "val", root)


def test_names_with_gaps_other_ignore_values_and_lists(root: Path) -> None:
    (root / "names.txt").unlink()
    (root / "names.json").write_text(json.dumps({"7": "sky", "2": "road"}))
    for name in ("a", "b"):
        picture(root / "images" / f"{name}.jpg")
        index_map(root / "masks" / f"{name}.png", filled(7, 2, 0, 9))
    (root / "some.txt").write_text("b\n")
    data = read("folder", "some", root, ignore="0, 9")
    assert data.classes == ("road", "sky")
    assert [data.image_id(i) for i in range(len(data))] == ["b"]
    assert np.array_equal(data.semantic(0), filled(1, 0, IGNORE, IGNORE))
    with pytest.raises(UsageError, match="value 7 is the class 'sky' and is to be ignored"):
        read("folder", "some", root, ignore=7)
    (root / "some.txt").write_text("c\n")
    with pytest.raises(DataError, match="lists c, which is not in images/"):
        read("folder", "some", root)


def test_lists_of_names_with_spaces(root: Path) -> None:
    for name in ("straße 1", "straße 2", "c"):
        picture(root / "images" / f"{name}.jpg")
        index_map(root / "masks" / f"{name}.png", filled(0))
    listing = root / "some.txt"
    listing.write_text("straße 2\nstraße 1.jpg\nc 1\n", encoding="utf-8")
    data = read("folder", "some", root)
    assert [data.image_id(i) for i in range(len(data))] == ["straße 2", "straße 1", "c"]
    for text, says in (
        ("c\nc.jpg\n", "lists c.jpg twice"),
        ("straße\n", "lists straße, which"),
        ("\n", "lists no image"),
    ):
        listing.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=says):
            read("folder", "some", root)


def test_unknown_splits_say_what_there_is(tmp_path: Path) -> None:
    for name in ("ade20k", "voc2012", "cityscapes", "coco-stuff", "pascal-context"):
        with pytest.raises(RiceEvalError, match="its splits: "):
            read(name, "tset", tmp_path)


# Class tables against the reference.


def _mmseg_names() -> ModuleType:
    found = importlib.util.find_spec("mmseg")
    if found is None or found.origin is None:
        pytest.skip("mmsegmentation is not installed")
    # The one file with the names, by its path: the package itself needs mmcv to import.
    path = Path(found.origin).parent / "utils" / "class_names.py"
    spec = importlib.util.spec_from_file_location("mmseg_class_names", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        pytest.skip(f"mmsegmentation's class names need {error.name}")
    return module


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("ade20k", "ade"),
        ("voc2012", "voc"),
        ("cityscapes", "cityscapes"),
        ("coco-stuff", "cocostuff"),
        ("pascal-context", "pcontext"),
    ],
)
def test_classes_and_colours_equal_mmsegs(ours: str, theirs: str) -> None:
    module = _mmseg_names()
    names, palette = class_table(ours)
    skip = 1 if ours == "pascal-context" else 0  # its table there begins after background
    assert list(names[skip:]) == [name.strip() for name in getattr(module, f"{theirs}_classes")()]
    assert [list(colour) for colour in palette[skip:]] == getattr(module, f"{theirs}_palette")()
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("chunk", [b"eXIf", b"iTXt"])
@pytest.mark.parametrize("behind", [False, True])
def test_the_size_of_a_png_is_known_without_decoding_it(chunk: bytes, behind: bool, monkeypatch: Any) -> None:
    """Wherever the orientation stands, the size is that of the turned photo; where there is none, no pixel is decoded."""
    written = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(written, "PNG")
    plain = written.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()[6:] if chunk == b"eXIf" else b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    told = struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    place = len(plain) - 12 if behind else 33  # before IEND, or after IHDR
    turned = plain[:place] + told + plain[place:]
    assert upright_size(io.BytesIO(turned), "x") == decode_image(turned, "x").shape[:2] == (50, 30)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert upright_size(io.BytesIO(plain), "x") == (30, 50)
    assert upright_size(io.BytesIO(plain[:45]), "x") == (30, 50)  # cut off: found out when it is read
