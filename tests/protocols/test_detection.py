"""Detection protocols: geometry both ways, losses that fall, choices, and eight images learnt by heart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_fakes import FakeEncoder, context_of

from rice_eval.adapters import load_encoder
from rice_eval.datasets.base import Dataset, Instances
from rice_eval.datasets.scenes import Scenes
from rice_eval.errors import DataError, UsageError
from rice_eval.metrics.coco import ApStatistics
from rice_eval.protocols.base import configure
from rice_eval.protocols.detection import frame_targets, to_image
from rice_eval.protocols.detection_fcos import FcosLinear, FcosSfp
from rice_eval.protocols.detection_train import LossLog
from rice_eval.views import View


class Squares(Dataset):
    """Plain coloured rectangles on grey: the colour is the class."""

    name, provides = "squares", frozenset({"instances"})
    things = ("red", "green", "blue")

    def __init__(self, split: str, count: int, size: tuple[int, int] = (56, 84), seed: int = 0, crowd: float = 0.0):
        self.split, self._size, self._seed, self._count, self._crowd = split, size, seed, count, crowd

    def __len__(self) -> int:
        return self._count

    @property
    def fingerprint(self) -> str:
        return f"{self.split}{self._count}{self._size}{self._seed}"

    def image_id(self, index: int) -> str:
        return f"{self.split}{index:03d}"

    def size(self, index: int) -> tuple[int, int]:
        return self._size

    def _boxes(self, index: int):
        rng = np.random.default_rng((self._seed, index, self.split == "train"))
        h, w = self._size
        n = 1 + int(rng.integers(0, 2))
        # One half of the image each, so that none hides another.
        start = np.stack([rng.integers(0, w // 2 - 26, n) + np.arange(n) * w // 2, rng.integers(0, h - 30, n)], 1)
        boxes = np.concatenate([start, start + rng.integers(14, 26, (n, 2))], 1).astype(np.float64)
        return boxes, rng.integers(0, 3, n), rng

    def image(self, index: int):
        boxes, labels, rng = self._boxes(index)
        out = np.full((*self._size, 3), 110, np.int64)
        for (x1, y1, x2, y2), label in zip(boxes.astype(int), labels):
            out[y1:y2, x1:x2] = np.eye(3, dtype=np.int64)[label] * 230
        return (out + rng.integers(-12, 12, out.shape)).clip(0, 255).astype(np.uint8)

    def instances(self, index: int) -> Instances:
        boxes, labels, rng = self._boxes(index)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return Instances(boxes, labels, None, rng.random(len(labels)) < self._crowd, area, np.arange(len(labels)))


VIEWS = ["square=112", "short=84", "letterbox=112", "long=96,pad=14", "native", "square=112,flip", "short=56,slide=28"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(VIEWS))
def test_boxes_go_through_every_view_and_back(seed, view):
    rng = np.random.default_rng(seed)
    height, width = (int(v) for v in rng.integers(40, 400, 2))
    boxes = rng.uniform(0, 1, (6, 4))
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    boxes *= (width, height, width, height)
    for frame in View.parse(view).frames(height, width):
        back = to_image(torch.from_numpy(frame.boxes(boxes)), frame)
        np.testing.assert_allclose(back, boxes, atol=1e-4)


def test_windows_cut_boxes_and_ignore_the_rest():
    data = Squares("train", 1)
    box = data.instances(0).boxes[0]
    frames = View.parse("short=56,slide=28").frames(*data.size(0))
    shown = 0
    for frame, target in zip(frames, frame_targets(data, 0, frames, 0.3)):
        assert (target.boxes >= 0).all()
        assert (target.boxes[:, 2] <= frame.size[1]).all()
        assert (target.boxes[:, 3] <= frame.size[0]).all()
        for part in target.boxes[target.which == 0]:
            inside = frame.boxes_back(part[None].astype(float))[0]
            assert (inside[:2] >= box[:2] - 1e-4).all()
            assert (inside[2:] <= box[2:] + 1e-4).all()
            shown += 1
    assert shown >= 1
    crowded = frame_targets(Squares("train", 1, crowd=1.0), 0, frames[:1], 0.3)[0]
    assert not len(crowded.labels)


class Odd(Squares):
    """One box of no area, one outside, one inside, one of a single pixel."""

    def instances(self, index: int) -> Instances:
        boxes = np.array([[10, 10, 10, 30], [200, 200, 220, 230], [10, 10, 40, 40], [5, 5, 6, 6]], float)
        return Instances(boxes, np.zeros(4, int), None, np.zeros(4, bool), np.ones(4), np.arange(4))


def test_boxes_without_area_or_outside_are_not_learnt():
    data = Odd("train", 1)
    frames = View.parse("square=112").frames(*data.size(0))
    assert frame_targets(data, 0, frames, 0.3)[0].which.tolist() == [2, 3]

    class Wrong(Squares):
        def instances(self, index: int) -> Instances:
            return replace(super().instances(index), labels=np.full(len(super().instances(index).labels), 7))

    with pytest.raises(DataError, match="outside the 3 classes"):
        frame_targets(Wrong("train", 1), 0, frames, 0.3)


@pytest.mark.parametrize("flip", [False, True])
def test_linear_finds_coloured_squares(flip):
    protocol = FcosLinear(
        view="square=112", lrs=(1e-2, 3e-2), steps=100, batch=8, layer_set="all", min_stride=1, flip_view=flip,
        radius=0.0,
    )  # fmt: skip
    context = context_of(protocol, Squares("train", 24), Squares("test", 10), keep_predictions=True, panels=3)
    outcome = protocol.run(context)
    assert isinstance(outcome.statistics, ApStatistics)
    assert outcome.statistics.point()["ap50"] > 15
    losses = outcome.chosen["losses"]
    assert losses[-1] < 0.8 * losses[0]
    assert len(outcome.heads) == 4
    best = max(outcome.heads, key=lambda h: h.score or 0.0)
    assert best.settings == {k: outcome.chosen[k] for k in ("layer", "lr", "wd")}
    assert len(outcome.panels) == 3
    assert outcome.predictions is not None
    assert len(outcome.predictions) == 10
    assert set(protocol.views()["train"]) == ({"square=112", "square=112,flip"} if flip else {"square=112"})


@pytest.mark.parametrize("view", ["square=112", "short=56,slide=28", "letterbox=84"])
def test_pyramid_losses_fall_in_any_view_and_the_same_seed_gives_the_same_numbers(view):
    protocol = FcosSfp(view=view, steps=20, batch=4, channels=16, convs=1, scales=(2.0, 1.0), lrs=(3e-3,))
    outcomes = [
        protocol.run(context_of(protocol, Squares("train", 8), Squares("test", 4), FakeEncoder())) for _ in range(2)
    ]
    losses = outcomes[0].chosen["losses"]
    assert losses[-1] < losses[0]
    assert outcomes[0].chosen == outcomes[1].chosen
    assert outcomes[0].statistics.point() == pytest.approx(outcomes[1].statistics.point(), nan_ok=True)


def test_more_than_one_rate_is_chosen_on_held_out_images():
    protocol = FcosSfp(
        view="square=56", steps=6, batch=4, channels=8, convs=0, scales=(1.0,), lrs=(1e-9, 1e-2), holdout=0.5
    )
    outcome = protocol.run(context_of(protocol, Squares("train", 8), Squares("test", 2)))
    assert [h.settings["lr"] for h in outcome.heads] == [1e-9, 1e-2]
    assert all(h.score is not None for h in outcome.heads)


def test_every_field_is_in_the_hash():
    base = FcosSfp(view="square=112")
    assert base.hash != replace(base, nms_iou=0.5).hash != replace(base, flip_view=True).hash
    assert FcosLinear(view="square=112").hash != base.hash


@pytest.mark.parametrize(
    ("field", "value"),
    [("nms_iou", 0), ("steps", 0), ("scales", "1,2"), ("channels", 12), ("warmup", 1), ("lrs", ""), ("holdout", 1)],
)
def test_bad_settings_are_one_line(field, value):
    with pytest.raises(UsageError) as error:
        configure(FcosSfp, {"view": "square=112", field: value})
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="mirrored already"):
        configure(FcosLinear, {"view": "square=112,flip", "flip_view": True})


def test_training_images_without_boxes_are_refused():
    class Empty(Squares):
        def instances(self, index: int) -> Instances:
            none = np.zeros(0)
            return Instances(none.reshape(0, 4), none.astype(int), None, none.astype(bool), none, none.astype(int))

    protocol = FcosLinear(view="square=56", lrs=(1e-2,))
    with pytest.raises(DataError, match="no training image has a box"):
        protocol.run(context_of(protocol, Empty("train", 2), Squares("test", 1)))


def test_an_image_without_objects_is_no_trouble():
    class Half(Squares):
        def instances(self, index: int) -> Instances:
            full = super().instances(index)
            if index % 2 == 0:
                return full
            none = np.zeros(0)
            return Instances(none.reshape(0, 4), none.astype(int), None, none.astype(bool), none, none.astype(int))

    protocol = FcosLinear(view="square=56", lrs=(1e-2,), steps=4, batch=2)
    outcome = protocol.run(context_of(protocol, Half("train", 4), Half("test", 4)))
    assert np.isfinite(outcome.statistics.point()["ap"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "sfp"])
def test_eight_scenes_are_learnt_by_heart(kind):
    data = Scenes("train", 8, 224)
    protocol = (
        FcosLinear(view="square=224", lrs=(1e-2,), wds=(0.0,), batch=8)
        if kind == "linear"
        else FcosSfp(view="square=224", steps=100, batch=8, channels=64, convs=1, scales=(2.0, 1.0), lrs=(3e-3,))
    )
    outcome = protocol.run(context_of(protocol, data, data, load_encoder("random-vit-s-14")))
    assert outcome.statistics.point()["ap50"] > 90


def test_predictions_are_written_as_coco_results_with_their_errors(tmp_path):
    from rice_eval.datasets.subset import Subset
    from rice_eval.pictures import save_predictions

    data = Subset(Squares("test", 6), 3)
    protocol = FcosLinear(view="square=112", lrs=(1e-2,), steps=40, batch=8, radius=0.0)
    outcome = protocol.run(context_of(protocol, Squares("train", 8), data, keep_predictions=True))
    assert outcome.predictions is not None
    save_predictions(tmp_path, outcome.predictions, data)
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == set(rows[0])
    assert min(row["category_id"] for row in rows) >= 1
    first = rows[0]["image_id"]
    found = outcome.predictions[first]
    x, y, w, h = rows[0]["bbox"]
    assert [x, y, x + w, y + h] == pytest.approx(found.boxes[0].tolist())
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors["ap50"] == pytest.approx(outcome.statistics.point()["ap50"])


def test_losses_that_grow_by_nature_are_no_warning() -> None:
    log = LossLog(lambda part: part == "box")
    for step in range(20):
        log.add(5 + 0.1 * step, {"class": 3 - 0.1 * step, "box": 2 + 0.2 * step})
    assert log.tenths() == sorted(log.tenths())
    assert log.parts()["class"] == pytest.approx([2.95 - 0.2 * k for k in range(10)])
    assert log.warnings() == ()
    log.add(50, {"class": 90, "box": 0})
    assert "did not fall" in log.warnings()[0]
    plain = LossLog()
    for loss in (1.0, 2.0):
        plain.add(loss)
    assert plain.warnings() == ("the training loss did not fall (1.000 to 2.000)",)
