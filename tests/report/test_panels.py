"""Pictures from arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rice_eval.report.panels import (
    Boxes,
    Polygons,
    class_palette,
    detection_panel,
    pca_maps,
    segmentation_panel,
    text_panel,
    upsample_nearest,
)

from .factory import CLASSES, scene


def test_palette_has_no_twins() -> None:
    colors = class_palette(150).astype(int)
    assert len({tuple(c) for c in colors}) == 150
    neighbours = np.abs(np.diff(colors[:40], axis=0)).sum(1)
    assert neighbours.min() > 60


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_upsampling_by_a_whole_factor_repeats(h: int, w: int, factor: int) -> None:
    cells = np.arange(h * w).reshape(h, w)
    expected = cells.repeat(factor, 0).repeat(factor, 1)
    assert np.array_equal(upsample_nearest(cells, (h * factor, w * factor)), expected)


def test_pca_is_that_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    rng = np.random.default_rng(0)
    tokens = [rng.normal(size=(12, 20)) * np.linspace(3, 0.1, 20) for _ in range(4)]
    maps = pca_maps(tokens, [(3, 4)] * 4)
    scores = decomposition.PCA(3).fit_transform(np.concatenate(tokens))
    got = np.concatenate([m.reshape(-1, 3) for m in maps]).astype(float)
    for k in range(3):
        assert abs(np.corrcoef(scores[:, k], got[:, k])[0, 1]) > 0.995  # clipped at the percentiles, in 256 steps


def test_pca_of_few_or_constant_features_is_grey_where_nothing_is() -> None:
    (constant,) = pca_maps([np.ones((4, 8))], [(2, 2)])
    assert np.array_equal(constant, np.full((2, 2, 3), 128))
    (one,) = pca_maps([np.arange(4.0)[:, None]], [(2, 2)])
    assert (one[..., 1:] == 128).all()
    assert one[..., 0].min() == 0
    assert one[..., 0].max() == 255


def test_pca_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="grid"):
        pca_maps([np.ones((5, 2))], [(2, 2)])
    with pytest.raises(ValueError, match="finite"):
        pca_maps([np.full((4, 2), np.nan)], [(2, 2)])
    assert pca_maps([], []) == []


def test_segmentation_panel_shows_truth_prediction_and_errors() -> None:
    image, truth = scene(np.random.default_rng(1))
    prediction = truth.copy()
    prediction[prediction < 0] = 0
    wrong = np.zeros_like(truth, dtype=bool)
    wrong[100:120, 50:90] = True
    prediction[wrong] = (truth[wrong] + 1) % len(CLASSES)
    panel = segmentation_panel("a", 3, image, truth, prediction, CLASSES)
    tiles = {tile.role: tile.picture for tile in panel.tiles}
    assert list(tiles) == ["image", "truth", "prediction", "error"]
    assert np.array_equal(tiles["image"], image)
    same = (tiles["truth"] == tiles["prediction"]).all(-1)
    assert np.array_equal(~same, wrong | (truth < 0))
    red = (tiles["error"][..., 0].astype(int) - tiles["error"][..., 1]) > 60
    assert np.array_equal(red, wrong)
    labelled = truth >= 0
    assert panel.note == f"{100 * (truth == prediction)[labelled].mean():.1f} % of pixels right"
    present = np.unique(np.concatenate([truth[labelled], prediction[labelled]]))
    assert [entry.name for entry in panel.legend] == [CLASSES[c] for c in present]
    assert [entry.color for entry in panel.legend] == [tuple(class_palette(15)[c]) for c in present]


def test_large_images_are_scaled_and_given_palettes_used() -> None:
    image = np.zeros((300, 600, 3), dtype=np.uint8)
    labels = np.ones((300, 600), dtype=np.int64)
    palette = [(1, 2, 3), (4, 5, 6)]
    tokens = pca_maps([np.random.default_rng(0).normal(size=(8, 5))], [(2, 4)])[0]
    panel = segmentation_panel("a", 0, image, labels, labels, ("x", "y"), palette=palette, tokens=tokens)
    assert [tile.role for tile in panel.tiles] == ["image", "truth", "prediction", "error", "tokens"]
    assert {tile.picture.shape for tile in panel.tiles} == {(112, 224, 3)}
    assert (panel.tiles[1].picture == (4, 5, 6)).all()
    with pytest.raises(ValueError, match="one height"):
        segmentation_panel("a", 0, image, labels[:10], labels, ("x", "y"))
    empty = segmentation_panel("a", 0, image, labels - 2, labels, ("x", "y"))
    assert empty.note == "no labelled pixels"


def test_detection_panel_draws_boxes_over_the_score() -> None:
    image = np.full((100, 100, 3), 200, dtype=np.uint8)
    truth = Boxes(np.array([[20.0, 30, 60, 80]]), np.array([1]))
    guess = Boxes(np.array([[22.0, 32, 61, 79], [0, 0, 9, 9]]), np.array([1, 0]), np.array([0.9, 0.1]))
    panel = detection_panel("a", 0, image, truth, guess, ("cat", "<script>\u05d0"), score=0.3)
    tiles = {tile.role: tile.picture for tile in panel.tiles}
    color = class_palette(2)[1]
    assert (tiles["truth"][55, 20] == color).all()
    assert (tiles["prediction"][55, 22] == color).all()
    assert (tiles["truth"][55, 40] == 200).all()
    assert panel.note == "1 true, 1 predicted at score 0.3 or more"
    assert [entry.name for entry in panel.legend] == ["<script>\u05d0"]
    none = Boxes(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros(0))
    assert detection_panel("a", 0, image, none, none, ()).note.startswith("0 true, 0 predicted")


@given(st.lists(st.floats(-50, 300), min_size=4, max_size=4))
def test_boxes_anywhere_can_be_drawn(box: list[float]) -> None:
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    boxes = Boxes(np.array([box]), np.array([7]), np.array([1.0]))
    assert detection_panel("a", 0, image, boxes, boxes, ("cat",)).tiles[2].picture.shape == (40, 40, 3)


def test_pages_have_their_text_inside_the_lines() -> None:
    image = np.full((300, 200, 3), 200, dtype=np.uint8)
    lines = [np.array([[10.0, y], [150, y], [150, y + 14], [10, y + 14]]) for y in range(10, 250, 24)]
    turned = np.array([[160.0, 20], [190, 50], [180, 60], [150, 30]])
    text = Polygons((*lines, turned), ("Total 9.50",) * len(lines) + ("up",))
    tile = text_panel("a", 0, image, text, Polygons((), ())).tiles[1].picture
    assert (tile[20, 100:149] == 255).all()  # nothing of the image left, and the text ends before
    assert (tile[13:22, 12:80] < 80).all(axis=2).any()
    assert (tile[26:32] == 200).all(axis=2)[:, :140].all()  # what lies between the lines is untouched
    assert (tile[35:45, 160:180] < 80).all(axis=2).any()
    boxes = text_panel("a", 0, image, Polygons(text.polygons, ("",) * len(text.texts)), Polygons((), ()))
    assert (boxes.tiles[1].picture[20, 20:149] == 200).all()


def test_text_panel_draws_polygons() -> None:
    image = np.zeros((60, 90, 3), dtype=np.uint8)
    square = np.array([[10.0, 30], [60, 30], [60, 50], [10, 50]])
    panel = text_panel("a", 0, image, Polygons((square,), ("\u0645\u0631 hello",)), Polygons((square,), ("hello",)))
    assert (panel.tiles[1].picture[40, 10] == (38, 194, 129)).all()
    assert panel.note == "0 of 1 lines read exactly"
    other = text_panel("a", 0, image, Polygons((square,), ("a",)), Polygons((), ()))
    assert other.note == "1 true lines, 0 found"
    moved = text_panel("a", 0, image, Polygons((square,), ("a",)), Polygons((square + 2,), ("a",)))
    assert moved.note == "1 true lines, 1 found"  # which line was read is not known here
    bare = text_panel("a", 0, image, Polygons((square,), ("",)), Polygons((square,), ("",)))
    assert bare.note == "1 true lines, 1 found"
    assert (bare.tiles[1].picture[:28] == 0).all()  # no label where there is no text


def test_text_boxes_far_beyond_the_page_are_drawn_at_its_size():
    page = np.zeros((50, 40, 3), dtype=np.uint8)
    far = np.array([[-1e6, -1e6], [1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]])
    unknown = np.array([[np.nan, 5.0], [30.0, 5.0], [30.0, 9.0], [5.0, 9.0]])
    text = Polygons((far, unknown) * 40, ("total 😀", "5.00") * 40)  # so many lines are a page
    panel = text_panel("a", 0, page, text, text)
    assert panel.tiles[1].picture.shape == page.shape
