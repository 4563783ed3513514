"""The bridge to the mm* packages: the stand-in for compiled operators, and an encoder as a backbone of a stock mmseg model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed (pip install 'rice-eval[openmmlab]')")
from rice_eval.openmmlab import EncoderBackbone, stand_in

MODEL = {
    "type": "EncoderDecoder",
    "data_preprocessor": {
        "type": "SegDataPreProcessor", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375],
        "bgr_to_rgb": True, "pad_val": 0, "seg_pad_val": 255, "size": (64, 64),
    },
    "backbone": {"type": "rice_eval.Encoder", "name": "random-vit-s-14"},
    "decode_head": {
        "type": "FCNHead", "in_channels": 384, "in_index": 0, "channels": 384, "num_convs": 0, "concat_input": False,
        "num_classes": 5, "dropout_ratio": 0, "norm_cfg": {"type": "BN"}, "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss"},
    },
    "test_cfg": {"mode": "slide", "crop_size": (64, 64), "stride": (42, 42)},
}  # fmt: skip


def test_stock_model_trains_and_predicts():
    pytest.importorskip("mmseg.registry", reason="mmseg is not installed")
    from mmengine.config import ConfigDict
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)  # as mmengine's Runner does
    model = MODELS.build(ConfigDict(MODEL))
    assert isinstance(model.backbone, EncoderBackbone)
    assert not [p for p in model.backbone.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    sample = SegDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (50, 70)})
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 5, (1, 64, 64), generator=generator))
    data = model.data_preprocessor({"inputs": [image], "data_samples": [sample]}, training=True)
    losses = model.loss(data["inputs"], data["data_samples"])
    losses["decode.loss_ce"].backward()
    assert model.decode_head.conv_seg.weight.grad.abs().sum() > 0
    model.eval()
    data = model.data_preprocessor({"inputs": [image], "data_samples": [sample]})
    (out,) = model.predict(data["inputs"], data["data_samples"])
    assert out.pred_sem_seg.data.shape == (1, 50, 70)


def test_features_are_the_encoders_own():
    from rice_eval.adapters import load_encoder

    backbone = EncoderBackbone("random-vit-s-14", out_indices=(5, -1))
    images = torch.rand(1, 3, 28, 42)
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1) / 255
    std = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1) / 255
    maps = backbone((images - mean) / std)
    tokens = load_encoder("random-vit-s-14").encode(images, (6, 12))
    assert [m.shape for m in maps] == [(1, 384, 2, 3)] * 2
    for found, layer in zip(maps, (6, 12)):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens.patches[layer], atol=1e-4, rtol=1e-4)


def test_pyramid_has_the_strides_detectors_expect():
    backbone = EncoderBackbone("random-vit-s-14", scales=(4, 2, 1, 0.5))
    assert backbone.channels == [384] * 4
    assert [tuple(m.shape[2:]) for m in backbone(torch.zeros(1, 3, 56, 56))] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_stand_in_gives_torchvisions_numbers_and_refuses_the_rest():
    if not stand_in():
        pytest.skip("compiled mmcv is installed")
    import mmcv.ops
    from torchvision.ops import nms, roi_align

    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(50, 4, generator=generator) * 30
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(50, generator=generator)
    kept, rows = mmcv.ops.nms(boxes, scores, 0.5)
    assert torch.equal(rows, nms(boxes, scores, 0.5))
    assert torch.equal(kept[:, 4], scores[rows])
    image = torch.rand(2, 3, 20, 20, generator=generator, requires_grad=True)
    rois = torch.cat([torch.randint(0, 2, (9, 1), generator=generator).float(), boxes[:9]], dim=1)
    found = mmcv.ops.roi_align(image, rois, (3, 3), 0.5, 2, "avg", True)
    expected = roi_align(image, rois, (3, 3), 0.5, 2, aligned=True)
    assert torch.equal(found, expected)
    (a,), (b,) = (torch.autograd.grad(v.square().sum(), image, retain_graph=True) for v in (found, expected))
    torch.testing.assert_close(a, b)
    with pytest.raises(NotImplementedError, match="compiled code"):
        mmcv.ops.modulated_deform_conv2d(
            torch.zeros(1, 1, 4, 4),
            torch.zeros(1, 18, 4, 4),
            torch.zeros(1, 9, 4, 4),
            torch.zeros(1, 1, 3, 3),
            None,
            1,
            1,
            1,
            1,
            1,
        )


def test_the_core_never_imports_it():
    code = "import sys, rice_eval.run, rice_eval.protocols.online; assert not {'mmcv', 'mmseg', 'mmengine'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
