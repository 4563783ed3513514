"""Detectors learn eight images by heart: targets, losses and decoding agree with each other."""

from __future__ import annotations

from dataclasses import replace

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


@pytest.mark.parametrize(
    ("strides", "stride", "layer"),
    [((14,) * 12, 16, 12), ((32,) * 12, 16, 12), ((2, 4, 8, 16, 32), 16, 4), ((4, 8, 8), 16, 3), ((2, 4, 8), 1, 1)],
)
def test_pyramids_stand_on_the_deepest_layer_that_is_fine_enough(strides, stride, layer):
    facts = replace(load_encoder("rgb-moments").facts, layers=len(strides), strides=strides, widths=(8,) * len(strides))
    for kind in (FcosSfp, MaskRcnnFrozen, CascadeMaskRcnnFrozen, RiceDetection):
        assert kind(view="square=224", stride=stride).layers(facts) == (layer,)
        with pytest.raises(ValueError, match="stride"):
            kind(view="square=224", stride=0)
