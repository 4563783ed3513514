"""Reading from the command line, on files in the layouts of the field."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rice_eval.cli.main import main
from rice_eval.datasets.scenes_text_set import ScenesText
from rice_eval.datasets.text_crops import TextCrops

lmdb = pytest.importorskip("lmdb")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def jpeg(pixels: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


def words(split: str, count: int) -> list[tuple[bytes, str]]:
    crops = TextCrops(ScenesText(split, 8, size=256), 32)
    assert len(crops) >= count
    return [(jpeg(crops.image(i)[:, : crops.content_width(i)]), crops.text(i)[0].text) for i in range(count)]


def write(root: Path, entries: list[tuple[bytes | None, bytes | None]]) -> None:
    """An LMDB as create_lmdb_dataset.py of the field writes it."""
    root.mkdir(parents=True)
    environment = lmdb.open(str(root), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for number, (image, label) in enumerate(entries, 1):
            if image is not None:
                transaction.put(b"image-%09d" % number, image)
            if label is not None:
                transaction.put(b"label-%09d" % number, label)
        transaction.put(b"num-samples", str(len(entries)).encode())
    environment.close()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """``training/MJ`` with two LMDBs and ``evaluation/IIIT5k_3000``, both with every kind of damage."""
    train = [(image, text.encode()) for image, text in words("train", 30)]
    image = train[0][0]
    write(tmp_path / "training" / "MJ" / "MJ_train", train[:24])
    write(
        tmp_path / "training" / "MJ" / "MJ_valid",
        [*train[24:], (image[: len(image) // 2], b"cut"), (image, "na\u00efve".encode()), (image, b"")],
    )
    val = [(image, text.encode()) for image, text in words("val", 12)]
    damaged = [
        (image[: len(image) // 2], b"cut"),  # 13: the header reads, the body does not
        (b"no image", b"none"),  # 14
        (None, b"gone"),  # 15
        (image, b"\xff\xfe"),  # 16: not UTF-8
        (image, None),  # 17
        (image, b""),  # 18: don't-care
        (image, "\u03a9mega".encode()),  # 19: no charset here writes it
    ]
    write(tmp_path / "evaluation" / "IIIT5k_3000", [*val, *damaged])
    return tmp_path


def test_lmdb_from_end_to_end_counts_every_damaged_entry(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "-t", "ocr/iiit5k", "-e", "rgb-moments", "--data", release, "--set", "steps=5", "--workers", 0]
    command += ["--set", "lrs=0.01,0.001", "--results", release / "r", "--bank", release / "b"]
    code, out, err = run(capsys, *command, "--json")
    assert code == 0, err
    line = json.loads(out.splitlines()[0])
    record = json.loads(Path(line["record"]).read_text())
    where = "evaluation/IIIT5k_3000"
    assert record["skipped"] == [
        *(f"{where}:{number:09d}" for number in (13, 14, 15, 16, 17)), "training/MJ:MJ_valid/000000007",
    ]  # fmt: skip
    notes = "\n".join(record["warnings"])
    assert "test: 5 entries can't be read: 000000013, 000000014, 000000015, 000000016, 000000017" in notes
    assert "test: 1 lines are don't-care or have an empty label" in notes
    assert "test: 1 of 13 lines have characters outside the charset 'ascii'" in notes
    assert "train: 1 entries can't be read: MJ_valid/000000007" in notes
    assert "train: 1 lines are don't-care or have an empty label" in notes
    assert "train: 1 of 31 lines have characters outside the charset 'ascii'" in notes
    assert "'\u00ef'" in notes
    # 12 good words and the one that can't be spelled: each is scored, the sweep and the test cost one pass over each split.
    assert record["statistics"]["images"] == 13
    assert record["cost"]["forwards"] == 31 + 13
    assert len(record["heads"]) == 2 * len({h["settings"]["layer"] for h in record["heads"]})
    assert record["task"]["n_test"] == 19
    code, out, err = run(capsys, *command, "--set", "charset=alnum", "--json")
    assert code == 0, err
    again = json.loads(Path(json.loads(out.splitlines()[0])["record"]).read_text())
    assert again["cost"]["forwards"] == 0  # another charset, another rate: the same tokens
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "6 unreadable images were left out: evaluation/IIIT5k_3000:000000013" in out


def test_data_check_names_what_is_damaged(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "data", "check", "lmdb", "--data", release, "--split", "evaluation/IIIT5k_3000", "--full"
    )
    assert code == 2
    assert "evaluation/IIIT5k_3000/000000013" in out
    assert "label-000000016 is not UTF-8" in out
    assert "has no image-000000015, though num-samples is 19" in out
    assert "note: evaluation/IIIT5k_3000/000000018" in out


def test_the_curve_of_a_run_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ocr", "-e", "rgb-moments", "--option", "n_train=4", "--option", "n_val=3", "--option", "size=256"]
    command += ["--set", "steps=3", "--results", tmp_path / "r", "--bank", tmp_path / "b", "--workers", 0]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    code, out, err = run(capsys, "curve", tmp_path / "r", "--format", "json")
    assert code == 0, err
    points = [json.loads(line) for line in out.splitlines()]
    assert {p["metric"] for p in points} == {"one_minus_ned"}
    assert [p["start"] for p in points] == sorted(p["start"] for p in points)
    page = (tmp_path / "r" / "report.html").read_text()
    assert "height 12 px" in page


def test_curves_of_records_that_differ_in_a_setting_stay_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for charset in ("ascii", "digits"):
        command = ["ocr", "-e", "rgb-moments", "--option", "n_train=4", "--option", "n_val=3", "--option", "size=256"]
        command += ["--set", "steps=3", "--set", f"charset={charset}", "--set", "batch=2", "--no-report"]
        code, _, err = run(capsys, *command, "--results", tmp_path / "r", "--bank", tmp_path / "b", "--workers", 0)
        assert code == 0, err
    code, out, err = run(capsys, "curve", tmp_path / "r")
    assert code == 0, err
    assert out.count("by height · key ") == 2
    assert out.count("rgb-moments") == 2
    code, _, err = run(capsys, "curve", tmp_path / "r", "--output", tmp_path / "table.txt")
    assert code == 2
    assert "--output takes no table" in err
