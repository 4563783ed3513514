"""An mmdet config with an encoder of the registry: trains two steps, evaluates; our numbers equal its own metric's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmengine", reason="mmengine is not installed (pip install 'rice-eval[openmmlab]')")
pytest.importorskip("mmcv", reason="mmcv is not installed (pip install 'rice-eval[openmmlab]')")
import rice_eval.openmmlab  # noqa: F401
from rice_eval.errors import UsageError
from rice_eval.results.store import ResultStore
from rice_eval.results.validate import validate

pytest.importorskip("mmdet.registry", reason="mmdet is not installed (pip install 'rice-eval[openmmlab]')")
from mmengine.config import Config

from rice_eval.openmmlab.detection import StridedBackbone, evaluate_detection, run_detection, with_strides

CONFIG = """
default_scope = "mmdet"
custom_imports = dict(imports=["rice_eval.openmmlab.detection"])
randomness = dict(seed=0)
data = dict(type="CocoDataset", metainfo=dict(classes=("red", "green", "blue")), data_root={root!r},
            ann_file="instances.json", data_prefix=dict(img="images/"))
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"), dataset=dict(**data, pipeline=[dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True), dict(type="Resize", scale=(112, 112), keep_ratio=True),
        dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]))
test_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dict(**data,
    test_mode=True, pipeline=[dict(type="LoadImageFromFile"), dict(type="Resize", scale=(112, 112), keep_ratio=True),
        dict(type="LoadAnnotations", with_bbox=True), dict(type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))]))
test_evaluator = dict(type="CocoMetric", ann_file={root!r} + "/instances.json", metric="bbox", format_only=False)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=100)
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3))
default_hooks = dict(checkpoint=None)
model = dict(type="FasterRCNN",
    data_preprocessor=dict(type="DetDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(type="rice_eval.StridedEncoder", name="rgb-moments"),
    neck=dict(type="FPN", in_channels=[6, 6, 6, 6], out_channels=16, num_outs=5),
    rpn_head=dict(type="RPNHead", in_channels=16, feat_channels=16,
        anchor_generator=dict(type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True), loss_bbox=dict(type="L1Loss")),
    roi_head=dict(type="StandardRoIHead",
        bbox_roi_extractor=dict(type="SingleRoIExtractor", roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
            out_channels=16, featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(type="Shared2FCBBoxHead", in_channels=16, fc_out_channels=32, roi_feat_size=7, num_classes=3,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False, loss_cls=dict(type="CrossEntropyLoss"), loss_bbox=dict(type="L1Loss"))),
    train_cfg=dict(
        rpn=dict(assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(type="RandomSampler", num=32, pos_fraction=0.5, add_gt_as_proposals=False), allowed_border=-1, pos_weight=-1, debug=False),
        rpn_proposal=dict(nms_pre=200, max_per_img=50, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
            sampler=dict(type="RandomSampler", num=32, pos_fraction=0.25, add_gt_as_proposals=True), pos_weight=-1, debug=False)),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.01, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 7 * k, "name": n} for k, n in ((3, "blue"), (1, "red"), (2, "green"))],
    }
    for key in range(1, 5):
        image = rng.integers(90, 130, (100, 120, 3))
        for _ in range(3):
            label, (x, y), (w, h) = int(rng.integers(3)), rng.integers(0, 60, 2), rng.integers(20, 40, 2)
            image[y : y + h, x : x + w] = np.eye(3)[label] * 220
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": key, "category_id": 7 * (label + 1), "iscrowd": 0,
                 "bbox": [int(x), int(y), int(w), int(h)], "area": int(w * h)}
            )  # fmt: skip
        content["images"].append({"id": key, "file_name": f"{key}.jpg", "width": 120, "height": 100})
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "images" / f"{key}.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(content))
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(root=str(tmp_path)))
    return path


def test_a_config_trains_two_steps_and_evaluates(config: Path, tmp_path: Path):
    result = run_detection(config, tmp_path / "work")
    assert result.statistics.image_ids == ("1", "2", "3", "4")
    point = result.statistics.point()
    for ours, theirs in (("ap", "mAP"), ("ap50", "mAP_50"), ("ap75", "mAP_75"), ("apm", "mAP_m")):
        assert result.metrics[f"coco/bbox_{theirs}"] == pytest.approx(point[ours] / 100, abs=0.00051)  # it rounds
    assert set(result.seconds) == {"fit", "predict"}


def test_our_statistics_equal_its_metric(config: Path):
    from mmdet.evaluation import CocoMetric

    from rice_eval.openmmlab.detection import Instances

    source = json.loads((config.parent / "instances.json").read_text())
    generator = torch.Generator().manual_seed(0)
    samples = []
    for key in range(1, 5):
        mine = [a for a in source["annotations"] if a["image_id"] == key]
        boxes = torch.tensor([[*a["bbox"][:2], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in mine])
        boxes = boxes.repeat(4, 1) + torch.randn(4 * len(mine), 4, generator=generator) * 3
        order = [c["id"] for c in source["categories"]]  # the file's: blue, red, green
        labels = torch.tensor([order.index(a["category_id"]) for a in mine]).repeat(4)
        found = {"bboxes": boxes, "labels": labels, "scores": torch.rand(len(labels), generator=generator)}
        samples.append({"img_id": key, "ori_shape": (100, 120), "pred_instances": found})
    classes = {"classes": ("red", "green", "blue")}
    file = str(config.parent / "instances.json")
    ours, theirs = Instances(file), CocoMetric(ann_file=file, metric="bbox")
    for metric in (ours, theirs):
        metric.dataset_meta = classes
        metric.process({}, samples)
    numbers = theirs.evaluate(4)
    point = ours.compute_metrics(ours.results)
    assert point["ap50"] > 10
    for name, named in (("ap", "mAP"), ("ap50", "mAP_50"), ("ap75", "mAP_75"), ("aps", "mAP_s"), ("apm", "mAP_m")):
        assert numbers[f"coco/bbox_{named}"] == pytest.approx(
            point[name] / 100, abs=0.00051
        )  # it rounds to three places


def test_maps_have_exact_strides_and_lie_where_the_image_does():
    backbone = StridedBackbone("rgb-moments", strides=(4, 8, 16))
    image = torch.zeros(1, 3, 100, 120)
    image[..., 60:] = 1.0
    maps = backbone(image)
    assert [tuple(m.shape) for m in maps] == [(1, 6, 25, 30), (1, 6, 13, 15), (1, 6, 7, 8)]
    bright = maps[0][0, 0, 10]
    assert bright[:12].std() < 1e-4  # far from the edge at x = 60, that is cell 15
    assert bright[19:26].std() < 1e-4
    assert (bright[12] + bright[20]) / 2 == pytest.approx(
        float(bright[14:16].mean()), abs=0.5 * float((bright[20] - bright[12]).abs())
    )


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rice_eval.cli.main", "detection", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_the_command_line_writes_our_record(config: Path, tmp_path: Path):
    results = tmp_path / "results"
    done = run_cli("--engine", "mmdet", "--config", str(config), "--results", str(results), "--json", "--no-report")
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["protocol"], line["encoder"]) == ("mmdet", "rgb-moments")
    record = ResultStore(results).load(Path(line["record"]))
    (checked,) = validate([results])
    assert checked.problem is None
    assert record.protocol.settings["engine"].startswith("mmdet 3.")
    assert record.task.n_test == record.statistics.images == 4
    assert record.cost.forwards == 2 * 2 + 4
    changed, _ = evaluate_detection(config, tmp_path / "other", resamples=20, options={"train_cfg.max_iters": 1})
    assert changed.protocol.hash != record.protocol.hash


def test_an_encoder_takes_the_place_of_a_backbone(config: Path, tmp_path: Path):
    text = config.read_text().replace(
        'dict(type="rice_eval.StridedEncoder", name="rgb-moments")',
        'dict(type="ResNet", depth=18, out_indices=(0, 1, 2, 3))',
    )
    config.write_text(text.replace("[6, 6, 6, 6]", "[64, 128, 256, 512]"))
    with pytest.raises(UsageError, match="no encoder of the registry"):
        evaluate_detection(config, tmp_path / "own", train=False, resamples=20)
    record, _ = evaluate_detection(config, tmp_path / "results", train=False, encoder="rgb-moments", resamples=20)
    assert "ResNet gave way to rgb-moments" in record.warnings[0]
    other, _ = evaluate_detection(config, tmp_path / "results", train=False, encoder="random-vit-s-14", resamples=20)
    assert other.comparability_key == record.comparability_key
    three = Config.fromfile(str(config))
    three.model.neck.in_channels = [128, 256, 512]
    with_strides(three, "rgb-moments")
    assert three.model.backbone.strides == [8, 16, 32]


def test_a_repeated_training_set_is_looked_into(config: Path, tmp_path: Path):
    repeated = Config.fromfile(str(config))
    inner = repeated.train_dataloader.dataset
    repeated.train_dataloader.dataset = {"type": "RepeatDataset", "times": 2, "dataset": inner}
    repeated.train_cfg.max_iters = 1
    path = tmp_path / "repeated.py"
    repeated.dump(str(path))
    record, _ = evaluate_detection(path, tmp_path / "results", resamples=20)
    assert record.task.n_train == 8
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "images", moved / "images")
    shutil.copy(tmp_path / "instances.json", moved)
    path.write_text(
        path.read_text().replace(repr(str(tmp_path)), repr(str(moved))).replace(f"{tmp_path}/inst", f"{moved}/inst")
    )
    again, _ = evaluate_detection(path, tmp_path / "again", resamples=20)
    assert again.protocol.hash == record.protocol.hash  # where the data lies is not what is measured


def test_what_is_no_config_is_one_line(config: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="can't be read"):
        run_detection(tmp_path / "none.py", tmp_path)
    (tmp_path / "bare.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match="has no test"):
        run_detection(tmp_path / "bare.py", tmp_path)
    bare = Config({"model": {"type": "DETR", "backbone": {"type": "ResNet"}}})
    with pytest.raises(UsageError, match="no backbone and neck"):
        with_strides(bare, "rgb-moments")
    with pytest.raises(UsageError, match="load_from 'https://example.org/w.pth' is no file here"):
        run_detection(config, tmp_path, options={"load_from": "https://example.org/w.pth"})
    with pytest.raises(UsageError, match="names an ann_file"):
        run_detection(config, tmp_path, options={"test_evaluator.ann_file": None})
