"""An mmseg config, unchanged, with an encoder of the registry as its backbone: our statistics equal its own metric."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmengine", reason="mmengine is not installed (pip install 'rice-eval[openmmlab]')")
pytest.importorskip("mmcv", reason="mmcv is not installed (pip install 'rice-eval[openmmlab]')")
import rice_eval.openmmlab  # noqa: F401
from rice_eval.errors import UsageError
from rice_eval.results.store import ResultStore
from rice_eval.results.validate import validate

pytest.importorskip("mmseg.registry", reason="mmseg is not installed")
from mmengine.config import Config

from rice_eval.openmmlab.run import evaluate_config, run_config, with_encoder

CONFIG = """
default_scope = "mmseg"
custom_imports = dict(imports=["rice_eval.openmmlab"])
meta = dict(classes=["sky", "sea", "sand"], palette=[[0, 0, 255], [0, 255, 0], [255, 255, 0]])
data = dict(type="BaseSegDataset", metainfo=meta, data_root={root!r}, reduce_zero_label=True,
            data_prefix=dict(img_path="images", seg_map_path="masks"), img_suffix=".jpg", seg_map_suffix=".png")
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", reduce_zero_label=True)]
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(**data, pipeline=[*load, dict(type="RandomResize", scale=(200, 56), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type="RandomCrop", crop_size=(56, 56), cat_max_ratio=0.75), dict(type="RandomFlip", prob=0.5),
        dict(type="PhotoMetricDistortion"), dict(type="PackSegInputs")]))
test_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dict(**data,
    pipeline=[dict(type="LoadImageFromFile"), dict(type="Resize", scale=(200, 56), keep_ratio=True),
        dict(type="LoadAnnotations", reduce_zero_label=True), dict(type="PackSegInputs")]))
test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=100)
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3))
default_hooks = dict(checkpoint=None)
model = dict(type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True, pad_val=0, seg_pad_val=255, size=(56, 56)),
    backbone=dict(type="rice_eval.Encoder", name="random-vit-s-14"),
    decode_head=dict(type="FCNHead", in_channels=384, in_index=0, channels=384, num_convs=0, concat_input=False, num_classes=3,
        dropout_ratio=0, norm_cfg=dict(type="BN"), align_corners=False, loss_decode=dict(type="CrossEntropyLoss")),
    test_cfg=dict(mode="slide", crop_size=(56, 56), stride=(37, 37)))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for k in range(3):
        Image.fromarray(rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)).save(tmp_path / "images" / f"{k}.jpg")
        Image.fromarray(rng.integers(0, 4, (60, 90)).astype(np.uint8)).save(tmp_path / "masks" / f"{k}.png")
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(root=str(tmp_path)))
    return path


def test_our_statistics_equal_its_metric(config: Path, tmp_path: Path):
    result = run_config(config, tmp_path / "work")
    assert result.statistics.image_ids == ("0", "1", "2")
    assert result.statistics.classes == ("sky", "sea", "sand")
    point = result.statistics.point()
    assert result.metrics["mIoU"] == pytest.approx(point["miou"], abs=0.0051)  # it rounds to two places
    assert result.metrics["aAcc"] == pytest.approx(point["pixel_accuracy"], abs=0.0051)
    assert "random-vit-s-14" in result.runner.cfg.pretty_text
    assert set(result.seconds) == {"fit", "predict"}


def test_what_is_no_config_is_one_line(config: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="can't be read"):
        run_config(tmp_path / "none.py", tmp_path)
    (tmp_path / "bare.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match="has no test"):
        run_config(tmp_path / "bare.py", tmp_path)


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rice_eval.cli.main", "segmentation", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_line_writes_our_record(config: Path, tmp_path: Path):
    results = tmp_path / "results"
    done = run_cli("--engine", "mmseg", "--config", str(config), "--results", str(results), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["protocol"], line["encoder"]) == ("mmseg", "random-vit-s-14")
    record = ResultStore(results).load(Path(line["record"]))
    (checked,) = validate([results])
    assert checked.problem is None
    assert record.protocol.settings["engine"].startswith("mmseg 1.")
    assert record.task.n_test == record.task.n_train == record.statistics.images == 3
    assert record.cost.forwards >= 2 * 2 + 3
    assert "sets no seed" in record.warnings[-1]
    again, path = evaluate_config(config, tmp_path / "other", resamples=50)
    assert again.protocol.hash == record.protocol.hash
    assert again.comparability_key == record.comparability_key
    assert set(json.loads(path.read_text())["metrics"]) == set(record.metrics)
    changed, _ = evaluate_config(config, tmp_path / "other", resamples=50, options={"train_cfg.max_iters": 3})
    assert changed.protocol.hash != record.protocol.hash


def test_an_encoder_takes_the_place_of_a_backbone(config: Path, tmp_path: Path):
    text = config.read_text().replace(
        'dict(type="rice_eval.Encoder", name="random-vit-s-14")', 'dict(type="ResNetV1c", depth=18)'
    )
    text = text.replace("channels=384", "channels=512").replace("in_index=0", "in_index=3")
    config.write_text(text)
    with pytest.raises(UsageError, match="no encoder of the registry"):
        evaluate_config(config, tmp_path / "own", train=False, resamples=50)
    record, _ = evaluate_config(config, tmp_path / "results", encoder="rgb-moments", resamples=50)
    assert record.encoder.name == "rgb-moments"
    assert "ResNetV1c gave way to rgb-moments" in record.warnings[0]
    other, _ = evaluate_config(config, tmp_path / "results", encoder="random-vit-s-14", resamples=50)
    assert other.comparability_key == record.comparability_key
    assert other.encoder.name == "random-vit-s-14"
    several = Config.fromfile(str(config))
    several.model.decode_head.in_index, several.model.decode_head.in_channels = [0, 1, 2, 3], [1, 2, 3, 4]
    with_encoder(several, "random-vit-s-14")
    assert several.model.backbone.scales == [4, 2, 1, 0.5]
    assert several.model.decode_head.in_channels == [384] * 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "mmseg"], "add --config"),
        (["--engine", "other"], "choose own or mmseg"),
        (["--config", "c.py", "-e", "rgb-moments"], "go with --engine mmseg"),
        (["--engine", "mmseg", "--config", "c.py", "--view", "square=56"], "--view does not reach into"),
        (["--engine", "mmseg", "--config", "none.py"], "can't be read"),
        ([], "no --encoder is given"),
    ],
)
def test_flags_of_the_wrong_engine_are_one_line(arguments: list[str], said: str):
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
