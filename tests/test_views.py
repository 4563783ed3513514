"""Views: geometry must be exact both ways, or every box and mask downstream is wrong."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rice_eval.errors import UsageError
from rice_eval.views import View, resize

VIEWS = [
    "square=56",
    "short=48",
    "long=64",
    "letterbox=56",
    "native",
    "native,flip",
    "short=40,slide=27,pad=14",
    "native,slide=30,crop=42",
    "letterbox=56,flip,interp=bilinear",
    "short=28,slide=even,interp=plain",
    "native,pad=14",
]
sides = st.integers(1, 150)


@given(st.sampled_from(VIEWS), sides, sides, st.randoms(use_true_random=False))
def test_boxes_and_points_go_there_and_back(text, height, width, random):
    boxes = np.array([[random.uniform(0, width) for _ in range(2)] + [random.uniform(0, height) for _ in range(2)]])
    boxes = np.array([[min(boxes[0, :2]), min(boxes[0, 2:]), max(boxes[0, :2]), max(boxes[0, 2:])]])
    for frame in View.parse(text).frames(height, width):
        np.testing.assert_allclose(frame.boxes_back(frame.boxes(boxes)), boxes, atol=1e-9)
        np.testing.assert_allclose(frame.points_back(frame.points(boxes[:, :2])), boxes[:, :2], atol=1e-9)


@given(st.sampled_from(VIEWS), sides, sides)
def test_mask_agrees_with_point_at_pixel_centre(text, height, width):
    mask = np.arange(height * width).reshape(height, width)
    for frame in View.parse(text).frames(height, width):
        out = frame.mask(mask, fill=-1)
        assert out.shape == frame.size
        x1, y1, x2, y2 = frame.content
        inside = np.zeros(frame.size, bool)
        inside[y1:y2, x1:x2] = True
        assert ((out >= 0) == inside).all()
        rows, cols = np.nonzero(inside)
        back = frame.points_back(np.stack([cols + 0.5, rows + 0.5], 1))
        # A centre that falls on a pixel edge may go either way in floating point; the mask uses whole numbers.
        expect_x, expect_y = np.floor(back[:, 0] + 1e-9), np.floor(back[:, 1] + 1e-9)
        ok = (np.abs(back - np.rint(back)) > 1e-6).all(1)
        got = out[rows, cols]
        assert (got[ok] == (expect_y * width + expect_x)[ok]).all()


@given(sides, sides)
def test_unscaled_view_shows_the_same_pixels(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ((window, frame),) = View.parse("native").apply(image)
    assert (window == image).all()
    assert frame.scale == (1, 1)
    ((mirrored, _),) = View.parse("native,flip").apply(image)
    assert (mirrored == image[:, ::-1]).all()


@given(st.integers(20, 400), st.integers(20, 400), st.integers(10, 120), st.integers(1, 120))
def test_sliding_windows_cover_every_pixel(height, width, crop, stride):
    stride = min(max(stride, crop // 8, 1), crop)
    seen = np.zeros((height, width), int)
    for frame in View.parse(f"native,slide={stride},crop={crop}").frames(height, width):
        top, left, bottom, right = frame.window
        assert bottom - top == min(crop, height)
        assert right - left == min(crop, width)
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1


def test_padding_of_a_window_is_padding_even_inside_the_image():
    image = np.full((40, 60, 3), 200, np.uint8)
    view = View.parse("native,slide=20,crop=40,pad=14")
    for window, frame in view.apply(image, fill=(1, 2, 3)):
        x1, y1, x2, y2 = frame.content
        assert window.shape == (42, 42, 3)
        assert (window[y1:y2, x1:x2] == 200).all()
        assert (window != 200).sum() == (42 * 42 - 40 * 40) * 3


@pytest.mark.parametrize("text", VIEWS)
def test_canonical_text_parses_to_the_same_view(text):
    assert View.parse(str(View.parse(text))) == View.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "square",
        "square=0",
        "square=ten",
        "square=9,short=9",
        "short=5,crop=4",
        "square=56,slide=9",
        "short=8,slide=9",
        "x=1",
        "native=3",
        "square=4,square=5",
        "square=4,interp=magic",
    ],
)
def test_bad_views_end_in_one_line(text):
    with pytest.raises(UsageError) as caught:
        View.parse(text)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 40), st.integers(1, 40))
def test_views_in_patches_resolve_to_pixels(patch, count):
    view = View.parse(f"short={count}p,slide={max(1, count // 2)}p,pad=patch")
    assert View.parse(str(view)) == view
    with pytest.raises(UsageError):
        view.frames(30, 40)
    resolved = view.resolve(patch)
    assert resolved == View.parse(f"short={count * patch},slide={max(1, count // 2) * patch},pad={patch}")
    for frame in resolved.frames(30, 40):
        assert frame.size[0] % patch == 0
        assert frame.size[1] % patch == 0


@pytest.mark.parametrize(
    "text", ["short=3p,slide=4p", "pad=patch", "square=0p", "square=p", "square=-3", "square=9,pad=2p"]
)
def test_bad_views_in_patches_end_in_one_line(text):
    with pytest.raises(UsageError):
        View.parse(text)


def test_a_stride_in_pixels_and_a_crop_in_patches_are_checked_at_the_patch():
    view = View.parse("short=32p,slide=341")
    assert str(view.resolve(16)) == "short=512,slide=341"
    assert view.resolve(14).crop == 448
    with pytest.raises(UsageError, match="leaves gaps"):
        view.resolve(10)


@pytest.mark.parametrize("side", [28, 29, 55, 56, 57, 100])
def test_even_windows_cover_the_side_with_as_few_as_it_takes(side):
    frames = View.parse("native,crop=28,slide=even").frames(28, side)
    assert len(frames) == -(-side // 28)
    spans = [frame.window[1::2] for frame in frames]
    assert spans[0][0] == 0
    assert spans[-1][1] == side
    assert all(right - left == 28 for left, right in spans)
    assert all(a[1] >= b[0] for a, b in pairwise(spans))


def test_plain_scaling_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (40, 61, 3)).astype(np.uint8)
    for size in ((20, 30), (63, 91), (40, 17)):
        expected = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR).astype(int)
        assert abs(resize(image, size, "plain").astype(int) - expected).max() <= 1  # OpenCV works in fixed point
