"""``scenes-text``: the same pages everywhere, lines where they are said to be, nothing shared between the splits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from rice_eval.datasets import load_dataset
from rice_eval.datasets.scenes_text_set import HEIGHTS, ScenesText
from rice_eval.datasets.subset import Subset
from rice_eval.datasets.text_crops import TextCrops, crop_of, line_facts, rectify
from rice_eval.errors import UsageError


def test_pages_are_the_same_bytes_everywhere():
    page = ScenesText("train", 3, size=256, seed=1)
    digest = hashlib.sha256(page.image(2).tobytes()).hexdigest()
    assert digest[:16] == "bf5f0bcae1687440"
    assert np.array_equal(ScenesText("train", 9, size=256, seed=1).image(2), page.image(2))
    assert ScenesText("train", 9, size=256, seed=1).fingerprint != page.fingerprint
    assert ScenesText("train", 3, size=256, seed=1).fingerprint == page.fingerprint


def test_lines_state_how_they_were_drawn():
    page = ScenesText("val", 2)
    seen = set()
    for index in range(2):
        lines, facts = page.text(index), page.line_facts(index)
        assert len(lines) == len(facts) > 8
        for line, fact in zip(lines, facts):
            seen.add(fact.height_px)
            assert line.polygon.min() >= 0
            assert line.polygon.max() <= 448
            top = line.polygon[1] - line.polygon[0]
            assert np.degrees(np.arctan2(top[1], top[0])) == pytest.approx(fact.rotation, abs=1)
            # The ink's box is a capital's height, up to descenders, small letters and rounding of the glyphs.
            assert 0.65 * fact.height_px - 1 < np.linalg.norm(line.polygon[3] - line.polygon[0]) < 1.5 * fact.height_px
    assert seen == set(HEIGHTS)


def test_splits_share_neither_words_nor_fonts():
    train, val = ScenesText("train", 12), ScenesText("val", 12)
    fonts = [{f.font for i in range(12) for f in d.line_facts(i)} for d in (train, val)]
    words = [{t.text.lower() for i in range(12) for t in d.text(i) if t.text.isalpha()} for d in (train, val)]
    assert not fonts[0] & fonts[1]
    assert not words[0] & words[1]


def test_factory_and_its_errors():
    made = load_dataset("scenes-text", "val", None, {"n_val": 3, "size": 256})
    assert len(made) == 3
    assert made.size(0) == (256, 256)
    with pytest.raises(UsageError, match="no split"):
        load_dataset("scenes-text", "test", None, {})


def test_crops_have_one_height_and_know_their_page():
    base = Subset(ScenesText("val", 4), 2)
    crops = TextCrops(base, height=56)
    assert len(crops) == sum(len(base.text(i)) for i in range(2))
    for k in (0, 5, len(crops) - 1):
        page, number = crops.origin(k)
        assert crops.text(k)[0].text == base.text(page)[number].text
        image = crops.image(k)
        assert image.shape[:2] == crops.size(k)
        assert image.shape[0] == 56
        assert image.shape[1] % 56 == 0
        assert 0 < crops.content_width(k) <= image.shape[1]
    assert line_facts(base, 1) == ScenesText("val", 4).line_facts(2)
    assert crops.fingerprint != TextCrops(base, height=64).fingerprint
    assert crops.fingerprint != base.fingerprint


def test_rectify_of_an_upright_box_is_the_crop_itself():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    box = np.array([(10, 5), (50, 5), (50, 25), (10, 25)], float)
    assert np.array_equal(rectify(image, box, (20, 40)), image[5:25, 10:50])
    # A polygon of six points whose halves are straight is the same quadrilateral.
    six = np.array([(10, 5), (30, 5), (50, 5), (50, 25), (30, 25), (10, 25)], float)
    assert np.array_equal(rectify(image, six, (20, 40)), image[5:25, 10:50])


def test_native_crops_keep_pixels():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, (100, 120, 3), dtype=np.uint8)
    box = np.array([(20, 40), (80, 40), (80, 60), (20, 60)], float)
    crop, content = crop_of(image, box, 56, "native", 0.0, 32.0)
    assert content == 60
    assert np.array_equal(crop[:, :60], image[22:78, 20:80])
    assert crop.shape == (56, 112, 3)
    assert crop_of(image, box, 56, "fit", 0.0, 32.0)[1] == 168
    assert crop_of(image, box, 56, "fit", 0.0, 2.0)[1] == 112
