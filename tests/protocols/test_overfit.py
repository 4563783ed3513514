"""Detectors learn eight images by heart: targets, losses and decoding agree with each other."""

from __future__ import annotations

import pytest
from segmentation_fakes import context_of

from rice_eval.adapters import load_encoder
from rice_eval.datasets.scenes import Scenes
from rice_eval.protocols.cascade import CascadeMaskRcnnFrozen, MaskRcnnFrozen, RiceDetection
from rice_eval.protocols.detection_fcos import FcosLinear, FcosSfp

pytest.importorskip("pycocotools", reason="pycocotools is not installed (pip install 'rice-eval[detection]')")

SCALES = (4.0, 2.0, 1.0)
TWO_STAGE = {
    "masks": False, "hidden": 128, "samples": 32, "proposals": 50, "scales": SCALES, "lr": 1e-3, "steps": 240,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FcosLinear, {"steps": 600, "lrs": (3e-2,)}),
        (FcosSfp, {"steps": 300, "lrs": (3e-3,), "channels": 64, "scales": SCALES}),
        (MaskRcnnFrozen, {**TWO_STAGE, "channels": 64}),
        (CascadeMaskRcnnFrozen, {**TWO_STAGE, "channels": 64}),
        (RiceDetection, TWO_STAGE),
    ],
)
def test_eight_images_are_learnt_by_heart(kind, settings):
    data = Scenes("train", 8, 224)
    protocol = kind(view="square=224", batch=8, **settings)
    context = context_of(protocol, data, data, load_encoder("random-vit-s-14"))
    assert protocol.run(context).statistics.point()["ap50"] > 90
