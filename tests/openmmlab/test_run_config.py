"""An mmseg config, unchanged, with an encoder of the registry as its backbone: our statistics equal its own metric."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmengine", reason="mmengine is not installed (pip install 'rice-eval[openmmlab]')")
pytest.importorskip("mmcv", reason="mmcv is not installed (pip install 'rice-eval[openmmlab]')")
import rice_eval.openmmlab  # noqa: F401
from rice_eval.errors import UsageError

pytest.importorskip("mmseg.registry", reason="mmseg is not installed")
from rice_eval.openmmlab.run import run_config

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
    assert "random-vit-s-14" in result.config
    assert set(result.seconds) == {"fit", "predict"}


def test_what_is_no_config_is_one_line(config: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="can't be read"):
        run_config(tmp_path / "none.py", tmp_path)
    (tmp_path / "bare.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match="has no test"):
        run_config(tmp_path / "bare.py", tmp_path)
