"""Two-stage detectors on frozen tokens: they learn, their masks lie on the objects, RICE's pyramid has no parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from segmentation_fakes import context_of
from test_detection import Squares

from rice_eval.datasets.base import Instances
from rice_eval.errors import DataError, UsageError
from rice_eval.metrics.coco import Found
from rice_eval.metrics.coco_masks import BoxMaskStatistics
from rice_eval.metrics.statistics import statistics_from_arrays
from rice_eval.probes.cascade import UNIT, CascadeRcnn, Settings, Wanted
from rice_eval.probes.pyramid import SimplePyramid, Standardise
from rice_eval.protocols.base import configure
from rice_eval.protocols.cascade import CascadeMaskRcnnFrozen, MaskRcnnFrozen, RiceDetection

coco_mask = pytest.importorskip("pycocotools.mask")


class Masked(Squares):
    """Squares with masks that fill their boxes."""

    def instances(self, index: int) -> Instances:
        full = super().instances(index)
        masks = []
        for x1, y1, x2, y2 in full.boxes.astype(int):
            drawn = np.zeros(self._size, np.uint8, order="F")
            drawn[y1:y2, x1:x2] = 1
            masks.append(coco_mask.encode(drawn))
        return replace(full, masks=tuple(masks))


TINY = {
    "scales": (2.0, 1.0), "hidden": 32, "mask_channels": 8, "samples": 32, "proposals": 50, "steps": 60, "batch": 4, "lr": 3e-3,
}  # fmt: skip


@pytest.mark.parametrize("kind", [MaskRcnnFrozen, CascadeMaskRcnnFrozen])
def test_boxes_and_masks_lie_on_the_squares(kind):
    protocol = kind(view="square=112", channels=16, **TINY)
    context = context_of(protocol, Masked("train", 16), Masked("test", 8), keep_predictions=True)
    outcome = protocol.run(context)
    assert isinstance(outcome.statistics, BoxMaskStatistics)
    point = outcome.statistics.point()
    assert point["ap50"] > 15
    # A mask that fills its box is no worse than the box.
    assert point["mask_ap50"] > 0.6 * point["ap50"]
    again = statistics_from_arrays("ap-masks", outcome.statistics.arrays())
    assert again.point() == pytest.approx(point, nan_ok=True)
    assert outcome.predictions is not None
    for found in outcome.predictions.values():
        assert isinstance(found, Found)
        assert found.masks is not None
        assert len(found.masks) == len(found.boxes)
        for mask, box in zip(found.masks, found.boxes):
            x, y, w, h = coco_mask.toBbox(mask)
            assert w * h == 0 or (x >= box[0] - 2 and y >= box[1] - 2 and x + w <= box[2] + 2 and y + h <= box[3] + 2)


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_generator_alone():
    protocol = MaskRcnnFrozen(view="short=56,slide=28", channels=8, **{**TINY, "steps": 4}, masks=False)
    state = torch.random.get_rng_state()
    outcomes = [protocol.run(context_of(protocol, Squares("train", 6), Squares("test", 3))) for _ in range(2)]
    assert outcomes[0].chosen == outcomes[1].chosen
    assert torch.equal(state, torch.random.get_rng_state())
    assert "mask_ap" not in outcomes[0].statistics.point()


def test_rices_pyramid_has_no_parameters_and_the_record_says_whose_schedule_it_is():
    protocol = RiceDetection(view="square=56", **{**TINY, "steps": 3, "scales": (4.0, 2.0, 1.0, 0.5, 0.25)})
    pyramid, channels = protocol.pyramid(9)
    assert not list(pyramid.parameters())
    assert channels == 9
    outcome = protocol.run(context_of(protocol, Masked("train", 4), Masked("test", 2)))
    assert any("not published" in w for w in outcome.warnings)


def test_masks_that_are_not_there_are_refused():
    protocol = MaskRcnnFrozen(view="square=112", channels=8, **TINY)
    with pytest.raises(DataError, match="no masks; give --set masks=false"):
        protocol.run(context_of(protocol, Squares("train", 2), Squares("test", 1)))
    with pytest.raises(UsageError, match="rising"):
        configure(CascadeMaskRcnnFrozen, {"view": "square=112", "ious": "0.7,0.5"})
    with pytest.raises(UsageError, match="no field 'channels'"):
        configure(RiceDetection, {"view": "square=112", "channels": "8"})


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 3)])
def test_any_grid_trains_even_without_targets(grid):
    scales = (4.0, 2.0, 1.0, 0.5)
    settings = Settings(2, (0.5, 0.6, 0.7), 16, 16, 20, 50, True, 8)
    inputs = Standardise(torch.zeros(6), torch.ones(6))
    model = CascadeRcnn(inputs, SimplePyramid(6, 8, scales), 8, scales, settings)
    none = Wanted(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 14, 14, dtype=torch.uint8), (1, 1)
    )
    h, w = grid
    box = torch.tensor([[2.0, 2, UNIT * w - 3, UNIT * h - 3]])
    full = torch.ones(1, h * UNIT, w * UNIT, dtype=torch.uint8)
    one = Wanted(box, torch.tensor([1]), full, (1.0, 1.0))
    losses = model.losses(torch.randn(2, 6, h, w), [none, one])
    assert set(losses) == {
        "loss_objectness", "loss_rpn_box_reg", "mask", *(f"{part}{k}" for part in ("class", "box") for k in range(3)),
    }  # fmt: skip
    total = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(total)
    total.backward()
    found = model.eval().detect(torch.randn(1, 6, h, w), 0.0, 0.5, 10)
    assert (found.boxes[:, 2] <= w * UNIT).all()
    assert (found.boxes[:, 3] <= h * UNIT).all()
    assert found.masks is not None
    assert len(found.masks) == len(found.boxes) <= 10
