"""Training views against OpenCV, Pillow and mmseg's own arithmetic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image as Pil

from rice_eval.datasets.base import IGNORE
from rice_eval.protocols.augment import AUGMENTS, Augment, _hued, colours, from_hsv, resize_labels, to_hsv

BASE = Augment("mmseg", 40, (0.5, 2.0), 48, 0.75, 0.5, 32.0, 0.5, 0.5, 0.1, (10, 20, 30))


def picture(seed: int = 0, height: int = 50, width: int = 70):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (height // 10, width // 10)).repeat(10, 0).repeat(10, 1)
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8), labels


def test_hsv_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    image = picture(1, 200, 300)[0]
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(int)
    found = to_hsv(image).astype(int)
    turn = abs(found[..., 0] - expected[..., 0])
    assert np.minimum(turn, 180 - turn).max() <= 1
    assert abs(found[..., 1:] - expected[..., 1:]).max() <= 1
    back = cv2.cvtColor(expected.astype(np.uint8), cv2.COLOR_HSV2RGB).astype(int)
    assert abs(from_hsv(expected.astype(np.uint8)).astype(int) - back).max() <= 1
    gray = np.full((2, 2, 3), 7, dtype=np.uint8)
    assert np.array_equal(from_hsv(to_hsv(gray)), gray)


def test_labels_are_resized_as_opencv_and_as_pillow():
    cv2 = pytest.importorskip("cv2")
    labels = np.random.default_rng(0).integers(0, 200, (40, 61))
    size = (33, 90)
    flat = labels.astype(np.uint8)
    expected = cv2.resize(flat, size[::-1], interpolation=cv2.INTER_NEAREST)
    assert (resize_labels(labels, size, centred=False) == expected).mean() > 0.98  # OpenCV rounds the scale
    expected = np.asarray(Pil.fromarray(flat).resize(size[::-1], Pil.Resampling.NEAREST))
    assert (resize_labels(labels, size, centred=True) == expected).mean() > 0.98


@pytest.mark.parametrize("kind", AUGMENTS)
def test_crops_have_their_size_and_repeat_by_seed(kind):
    image, labels = picture()
    augment = dataclasses.replace(BASE, kind=kind)
    padded = 0
    for seed in range(20):
        crop, cut = augment(image, labels, np.random.default_rng(seed))
        assert crop.shape == (48, 48, 3)
        assert crop.dtype == np.uint8
        assert cut.shape == (48, 48)
        assert set(np.unique(cut)) <= {IGNORE, 0, 1, 2, 3}
        again = augment(image, labels, np.random.default_rng(seed))
        assert np.array_equal(crop, again[0])
        assert np.array_equal(cut, again[1])
        void = cut == IGNORE
        padded += bool(void.any())
        assert (crop[void] == np.array([10, 20, 30])).all()
    assert 0 < padded < 20


def test_image_and_labels_stay_together():
    """With the colour a function of the class, every crop's labels can be read off its colours."""
    labels = picture()[1]
    image = (np.array([20, 90, 160, 230])[labels][..., None] * np.ones(3)).astype(np.uint8)
    for kind in AUGMENTS:
        augment = dataclasses.replace(
            BASE, kind=kind, ratios=(1.5, 2.0), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.001
        )
        for seed in range(10):
            crop, cut = augment(image, labels, np.random.default_rng(seed))
            read = np.abs(crop[..., :1].astype(int) - np.array([20, 90, 160, 230])).argmin(-1)
            shown = cut != IGNORE
            assert (read[shown] == cut[shown]).mean() > 0.85  # interpolated edges differ


def test_no_class_fills_a_crop():
    labels = np.zeros((60, 60), dtype=np.int64)
    labels[:, 50:] = 1
    image = np.zeros((60, 60, 3), dtype=np.uint8)

    def share(limit: float) -> float:
        augment = dataclasses.replace(BASE, side=60, ratios=(1.0, 1.0), crop=30, cat_max_ratio=limit)
        cuts = [augment(image, labels, np.random.default_rng(s))[1] for s in range(60)]
        return float(np.mean([(c == 0).mean() < 0.75 for c in cuts]))

    assert share(0.75) > share(1.0) + 0.2


def test_a_crop_of_vfm_holds_a_label():
    labels = np.full((60, 60), IGNORE, dtype=np.int64)
    labels[58:, 58:] = 2
    augment = dataclasses.replace(BASE, kind="vfm", side=30, ratios=(2.0, 2.0), crop=30, flip=0.0)
    for seed in range(10):
        assert (augment(np.zeros((60, 60, 3), np.uint8), labels, np.random.default_rng(seed))[1] == 2).any()
    empty = np.full((60, 60), IGNORE, dtype=np.int64)
    assert (augment(np.zeros((60, 60, 3), np.uint8), empty, np.random.default_rng(0))[1] == IGNORE).all()


@pytest.mark.parametrize("kind", AUGMENTS)
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_every_colour_number_is_read(kind, name):
    image = picture()[0]
    base = dataclasses.replace(BASE, kind=kind)
    other = dataclasses.replace(base, **{name: getattr(base, name) * 0.5})
    pairs = [[colours(a, image, np.random.default_rng(s)) for a in (base, other)] for s in range(12)]
    assert any(not np.array_equal(*pair) for pair in pairs)


def test_no_hue_leaves_the_picture():
    image = picture()[0]
    for seed in range(12):
        assert np.array_equal(_hued(image, 0.0, "mmseg", np.random.default_rng(seed)), image)
