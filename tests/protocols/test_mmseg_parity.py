"""The same numbers as mmseg itself: logits of slide and whole inference, IoU, and the training loss of ``dinov2-linear``."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rice_eval.datasets.base import IGNORE
from rice_eval.metrics.iou import IoUStatistics, areas_of, confusion
from rice_eval.protocols.online_head import PixelHead, pixel_loss
from rice_eval.protocols.segmentation import label_map, scaled_logits
from rice_eval.views import View

pytest.importorskip(
    "mmcv", reason="mmseg is not installed (pip install 'rice-eval[openmmlab]', in an environment of its own)"
)
from rice_eval.openmmlab.ext import stand_in

stand_in()
mmseg = pytest.importorskip("mmseg", reason="mmseg is not installed (pip install 'rice-eval[openmmlab]')")

from mmseg.evaluation import IoUMetric  # noqa: E402
from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # noqa: E402
from mmseg.models.segmentors import EncoderDecoder  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402


class BNHead(BaseDecodeHead):
    """DINOv2's form: batch norm, then ``conv_seg`` (written anew after its config's keys)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.bn = torch.nn.BatchNorm2d(self.in_channels)

    def forward(self, inputs):
        return self.cls_seg(self.bn(self._transform_inputs(inputs)))


@settings(max_examples=25)
@given(
    st.integers(0, 999), st.integers(20, 60), st.integers(20, 60), st.sampled_from([(16, 11), (24, 24), (32, 20)]),
    st.integers(15, 90), st.integers(15, 90),
)  # fmt: skip
def test_slide_and_whole_inference(seed, height, width, window, full_h, full_w):
    """A random "network" of windows: mmseg's own loops against ours, to the size of the original image."""
    crop, stride = window
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(4, 3, 8, 8, generator=generator)
    image = torch.rand(1, 3, height, width, generator=generator)

    def coarse(images):
        return F.conv2d(images, kernel, stride=8)

    def encode_decode(images, metas):
        return F.interpolate(coarse(images), size=images.shape[2:], mode="bilinear", align_corners=False)

    model = SimpleNamespace(
        test_cfg=SimpleNamespace(stride=(stride, stride), crop_size=(crop, crop)), out_channels=4, align_corners=False,
        encode_decode=encode_decode,
    )  # fmt: skip
    sample = SegDataSample(metainfo={"ori_shape": (full_h, full_w), "img_shape": (height, width)})
    for text, infer in ((f"native,slide={stride},crop={crop}", "slide_inference"), ("native", "whole_inference")):
        theirs = getattr(EncoderDecoder, infer)(model, image, [{}])
        frames = View.parse(text).frames(height, width)
        pieces = [coarse(image[:, :, f.window[0] : f.window[2], f.window[1] : f.window[3]])[0] for f in frames]
        ours = scaled_logits(pieces, frames)
        torch.testing.assert_close(ours, theirs[0], atol=1e-6, rtol=1e-6)
        done = EncoderDecoder.postprocess_result(model, theirs, [sample])[0]
        assert torch.equal(label_map(ours, (full_h, full_w)).long(), done.pred_sem_seg.data[0])


@settings(max_examples=40)
@given(st.integers(0, 9999), st.integers(2, 9), st.integers(1, 5))
def test_iou_accuracy_and_per_class(seed, classes, images):
    rng = np.random.default_rng(seed)
    matrices, results = [], []
    for _ in range(images):
        shape = rng.integers(1, 40, 2)
        truth = rng.integers(-1, classes, shape)
        predicted = np.where(rng.random(shape) < 0.5, truth.clip(0), rng.integers(0, classes, shape))
        matrices.append(confusion(predicted, truth, classes, IGNORE))
        label = torch.from_numpy(np.where(truth == IGNORE, 255, truth))
        results.append(IoUMetric.intersect_and_union(torch.from_numpy(predicted), label, classes, 255))
    names = [str(c) for c in range(classes)]
    ours = IoUStatistics(
        [str(i) for i in range(images)], np.stack([areas_of(m) for m in matrices]), names, sum(matrices)
    )
    theirs = IoUMetric.total_area_to_metrics(*[sum(parts) for parts in zip(*results)], ["mIoU"])
    with np.errstate(invalid="ignore"):
        mean_iou, mean_acc = (
            100 * np.nanmean(theirs[k]) if np.isfinite(theirs[k]).any() else np.nan for k in ("IoU", "Acc")
        )
    found = ours.point()
    assert found["pixel_accuracy"] == pytest.approx(
        100 * float(theirs["aAcc"]), abs=2e-5, nan_ok=True
    )  # theirs: float32
    assert found["miou"] == pytest.approx(mean_iou, abs=2e-5, nan_ok=True)
    assert found["mean_accuracy"] == pytest.approx(mean_acc, abs=2e-5, nan_ok=True)
    each = ours.per_class()
    np.testing.assert_allclose(list(each["iou"].values()), 100 * theirs["IoU"], atol=2e-5)
    np.testing.assert_allclose(list(each["accuracy"].values()), 100 * theirs["Acc"], atol=2e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_of_a_step(seed):
    """Features of crops with ignored pixels: mmseg's head and its cross-entropy, weights and gradients too."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(4, 12, 5, 5, generator=generator) * 3 + 1
    labels = torch.randint(-1, 6, (4, 64, 64), generator=generator)
    theirs = BNHead(
        in_channels=[12], in_index=[0], input_transform="resize_concat", channels=12, num_classes=6, dropout_ratio=0,
        align_corners=False, norm_cfg={"type": "BN"}, loss_decode={"type": "CrossEntropyLoss", "loss_weight": 1.0},
    )  # fmt: skip
    ours = PixelHead(12, 6, norm=True, dropout=0.0, init="normal", seed=seed)
    theirs.conv_seg.load_state_dict(ours.conv.state_dict())
    theirs.train()
    ours.train()
    samples = [SegDataSample() for _ in range(4)]
    from mmengine.structures import PixelData

    for sample, label in zip(samples, labels):
        sample.gt_sem_seg = PixelData(data=torch.where(label == IGNORE, 255, label)[None])
    expected = theirs.loss_by_feat(theirs([features]), samples)["loss_ce"]
    expected.backward()
    found = pixel_loss(ours(features), labels, average_ignored=True)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(ours.conv.weight.grad, theirs.conv_seg.weight.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.norm.weight.grad, theirs.bn.weight.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.norm.running_var, theirs.bn.running_var)
