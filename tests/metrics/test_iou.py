"""IoU against scikit-learn and mmseg, weights against repeated images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score

from rice_eval.metrics.iou import IoUStatistics, areas_of, confusion
from rice_eval.metrics.statistics import statistics_from_arrays

IGNORE = -1


def random_pairs(seed: int, images: int, classes: int):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(images):
        h, w = rng.integers(1, 12, 2)
        truth = rng.integers(-1, classes, (h, w))
        noisy = np.where(rng.random((h, w)) < 0.6, truth.clip(0), rng.integers(0, classes, (h, w)))
        pairs.append((noisy, truth))
    return pairs


def statistics_of(pairs, classes: int) -> IoUStatistics:
    matrices = [confusion(p, t, classes, IGNORE) for p, t in pairs]
    names = [f"class {k}" for k in range(classes)]
    ids = [f"image {k}" for k in range(len(pairs))]
    return IoUStatistics(ids, np.stack([areas_of(m) for m in matrices]), names, np.sum(matrices, axis=0))


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 7))
def test_equals_scikit_learn(seed: int, images: int, classes: int):
    pairs = random_pairs(seed, images, classes)
    truth = np.concatenate([t[t != IGNORE] for _, t in pairs])
    predicted = np.concatenate([p[t != IGNORE] for p, t in pairs])
    found = statistics_of(pairs, classes)
    if not len(truth):
        assert np.isnan(found.point()["miou"])
        return
    labels = np.arange(classes)
    matrix = confusion_matrix(truth, predicted, labels=labels)
    np.testing.assert_array_equal(found.matrix, matrix)
    occurring = np.union1d(truth, predicted)
    expected = jaccard_score(truth, predicted, labels=occurring, average="macro") * 100
    assert found.point()["miou"] == pytest.approx(expected, abs=1e-9)
    assert found.point()["pixel_accuracy"] == pytest.approx(100 * np.mean(truth == predicted), abs=1e-9)
    each = found.per_class()["iou"]
    for k, value in zip(labels, jaccard_score(truth, predicted, labels=labels, average=None, zero_division=0)):
        if k in occurring:
            assert each[f"class {k}"] == pytest.approx(100 * value, abs=1e-9)
        else:
            assert np.isnan(each[f"class {k}"])


def test_weights_repeat_images():
    pairs = random_pairs(3, 5, 4)
    found = statistics_of(pairs, 4)
    counts = [2, 0, 1, 3, 0]
    repeated = statistics_of([p for p, n in zip(pairs, counts) for _ in range(n)], 4)
    values = found.values(np.array([counts, [1] * 5], dtype=float))
    for name, value in repeated.point().items():
        assert values[name][0] == value
    assert values["miou"][1] == found.point()["miou"]


def test_many_rows_equal_one_by_one():
    found = statistics_of(random_pairs(4, 6, 5), 5)
    weights = np.random.default_rng(0).multinomial(6, [1 / 6] * 6, size=2500).astype(float)
    together = found.values(weights)
    for row in (0, 1023, 1024, 2499):
        for name, value in found.values(weights[row : row + 1]).items():
            np.testing.assert_array_equal(together[name][row], value[0])


def test_survives_its_arrays():
    found = statistics_of(random_pairs(5, 4, 3), 3)
    again = statistics_from_arrays("iou", found.arrays())
    assert isinstance(again, IoUStatistics)
    assert again.image_ids == found.image_ids
    assert again.classes == found.classes
    assert again.point() == found.point()


def test_a_class_absent_from_the_truth_counts_when_predicted():
    truth, predicted = np.array([[0, 0, 0, 0]]), np.array([[0, 0, 0, 1]])
    found = statistics_of([(predicted, truth)], 3)
    assert found.point()["miou"] == pytest.approx((75 + 0) / 2)
    assert found.point()["mean_accuracy"] == pytest.approx(75)
    assert found.per_class()["accuracy"]["class 0"] == 75
    assert np.isnan(found.per_class()["accuracy"]["class 1"])


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="shape"):
        confusion(np.zeros((2, 2), int), np.zeros((2, 3), int), 3, IGNORE)
    with pytest.raises(ValueError, match="truth has label 7"):
        confusion(np.zeros((2, 2), int), np.full((2, 2), 7), 3, IGNORE)
    with pytest.raises(ValueError, match="prediction has label -1"):
        confusion(np.full((2, 2), -1), np.zeros((2, 2), int), 3, IGNORE)
    areas = np.zeros((1, 3, 2), dtype=np.int64)
    with pytest.raises(ValueError, match="twice"):
        IoUStatistics(["a"], areas, ["x", "x"], np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="add up"):
        IoUStatistics(["a"], areas, ["x", "y"], np.ones((2, 2), dtype=np.int64))
