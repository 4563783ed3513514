"""Mean per-class accuracy of regions: against scikit-learn, under weights, through files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rice_eval.metrics.regions import RegionStatistics
from rice_eval.metrics.statistics import statistics_from_arrays


def made(seed, images=7, classes=5, count=40):
    rng = np.random.default_rng(seed)
    image, label = rng.integers(0, images, count), rng.integers(0, classes, count)
    guesses = {"roialign": rng.integers(0, classes, count), "crop": rng.integers(0, classes, count)}
    ids, names = [f"{i}" for i in range(images)], [f"c{k}" for k in range(classes)]
    return image, label, guesses, (ids, names)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_equals_balanced_accuracy_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    image, label, guesses, (ids, names) = made(seed)
    found = RegionStatistics.of(ids, names, image, label, {m: g == label for m, g in guesses.items()})
    point = found.point()
    for tail, method in (("", "roialign"), ("_crop", "crop")):
        mean = metrics.recall_score(label, guesses[method], labels=np.unique(label), average="macro", zero_division=0)
        assert point[f"macc{tail}"] == pytest.approx(100 * mean)
        assert point[f"accuracy{tail}"] == pytest.approx(100 * np.mean(guesses[method] == label))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_weights_are_repeated_images(seed):
    image, label, guesses, (ids, names) = made(seed)
    right = {"it": guesses["crop"] == label}
    weights = np.random.default_rng(seed).integers(0, 3, len(ids))
    found = RegionStatistics.of(ids, names, image, label, right).values(weights[None].astype(float))
    rows = np.concatenate([np.repeat(np.flatnonzero(image == i), w) for i, w in enumerate(weights)])
    if not len(rows):
        assert np.isnan(found["macc"][0])
        return
    again = RegionStatistics.of(ids, names, image[rows], label[rows], {"it": right["it"][rows]}).point()
    assert found["macc"][0] == pytest.approx(again["macc"])
    assert found["accuracy"][0] == pytest.approx(again["accuracy"])


def test_survives_its_arrays_and_joins():
    image, label, guesses, (ids, names) = made(3)
    found = RegionStatistics.of(ids, names, image, label, {m: g == label for m, g in guesses.items()})
    again = statistics_from_arrays("regions", found.arrays())
    assert again.point() == found.point()
    assert found.concat(again).point() == pytest.approx(found.point())
    assert set(found.per_class()["accuracy"]) == set(names)
    with pytest.raises(ValueError, match="differ"):
        found.concat(RegionStatistics.of(ids, names, image, label, {"it": label == 0}))
    with pytest.raises(ValueError, match="outside the 5 classes"):
        RegionStatistics.of(ids, names, image, label + 5, {})


def test_no_region_gives_nothing():
    none = np.zeros(0, int)
    assert np.isnan(RegionStatistics.of(["a"], ["c"], none, none, {"it": none > 0}).point()["macc"])
