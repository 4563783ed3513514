"""Intervals and paired tests: against brute force, against scipy, and what they promise."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_factory import make_statistics

from rice_eval.metrics.iou import IoUStatistics, areas_of, confusion
from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.results.bootstrap import (
    combine,
    estimates,
    in_range,
    intervals,
    jackknife,
    jackknife_se,
    replicates,
    resample_weights,
)
from rice_eval.results.paired import detectable_drop, holm, paired
from rice_eval.results.student import Spread, student_cdf, student_quantile

scipy_stats = pytest.importorskip("scipy.stats")


def iou(n: int = 60, classes: int = 5, seed: int = 0, skill: float = 0.7) -> IoUStatistics:
    rng = np.random.default_rng(seed)
    matrices = []
    for _ in range(n):
        truth = rng.integers(0, classes, 400)
        guess = np.where(
            rng.random(400) < np.clip(skill + rng.normal(0, 0.1), 0, 1), truth, rng.integers(0, classes, 400)
        )
        matrices.append(confusion(guess, truth, classes, 255))
    areas = np.stack([areas_of(m) for m in matrices])
    return IoUStatistics(
        [f"i{k}" for k in range(n)], areas, [f"c{k}" for k in range(classes)], np.sum(matrices, axis=0)
    )


def ratio(values: np.ndarray, ids: tuple[str, ...] | None = None) -> RatioStatistics:
    n = len(values)
    return RatioStatistics(ids or tuple(f"i{k}" for k in range(n)), values[:, None], np.ones((n, 1)), ("accuracy",))


@given(st.integers(1, 40), st.integers(1, 1500), st.integers(0, 5))
def test_weights_are_multinomial_counts(images: int, resamples: int, seed: int) -> None:
    weights = np.concatenate(list(resample_weights(images, resamples, seed)))
    assert weights.shape == (resamples, images)
    assert (weights.sum(axis=1) == images).all()
    assert (weights == np.round(weights)).all()
    assert (weights >= 0).all()
    again = np.concatenate(list(resample_weights(images, resamples, seed)))
    assert (weights == again).all()


def test_weights_have_the_moments_of_a_multinomial() -> None:
    weights = np.concatenate(list(resample_weights(20, 40_000)))
    assert weights.mean(axis=0) == pytest.approx(np.ones(20), abs=0.03)
    assert weights.var(axis=0) == pytest.approx(np.full(20, 19 / 20), abs=0.05)
    assert np.corrcoef(weights.T)[0, 1] == pytest.approx(-1 / 19, abs=0.02)


def test_replicates_equal_scoring_a_resampled_set() -> None:
    whole = iou(n=15)
    weights = next(iter(resample_weights(15, 20)))
    for row, value in zip(weights, replicates(whole, 20)["miou"]):
        drawn = np.repeat(np.arange(15), row.astype(int))
        total = whole.areas[drawn].sum(axis=0).astype(float)
        union = total[1] + total[2] - total[0]
        assert value == pytest.approx(100 * np.mean((total[0] / union)[union > 0]), rel=1e-12)


def test_mean_of_a_ratio_agrees_with_the_t_interval() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, 300)
    low, high = intervals(ratio(values), resamples=20_000)["accuracy"]
    mean, se = 100 * values.mean(), 100 * values.std(ddof=1) / math.sqrt(300)
    t = scipy_stats.t.ppf(0.975, 299)
    assert low == pytest.approx(mean - t * se, abs=0.03)
    assert high == pytest.approx(mean + t * se, abs=0.03)


def test_jackknife_of_a_mean_is_the_textbook_error() -> None:
    values = np.random.default_rng(0).random(80)
    assert jackknife_se(jackknife(ratio(values))["accuracy"]) == pytest.approx(100 * values.std(ddof=1) / math.sqrt(80))


def test_many_images_are_left_out_in_blocks() -> None:
    values = np.random.default_rng(0).random(3000)
    left = jackknife(ratio(values))["accuracy"]
    assert len(left) == 500
    assert jackknife_se(left) == pytest.approx(100 * values.std(ddof=1) / math.sqrt(3000), rel=0.1)


def test_clusters_widen_the_interval_and_match_averaged_clusters() -> None:
    rng = np.random.default_rng(0)
    centre = rng.random(60)
    values = np.repeat(centre, 10)
    groups = [f"video-{k}" for k in np.repeat(np.arange(60), 10)]
    alone = estimates(ratio(values))["accuracy"]
    clustered = estimates(ratio(values), groups=groups)["accuracy"]
    assert clustered.se == pytest.approx(alone.se * math.sqrt(10), rel=0.15)
    assert clustered.se == pytest.approx(100 * centre.std(ddof=1) / math.sqrt(60), rel=0.1)
    with pytest.raises(ValueError, match="59 group labels for 600 images"):
        intervals(ratio(values), groups=groups[:59])


def test_one_group_an_image_is_no_grouping() -> None:
    s = iou()
    assert intervals(s, 200, groups=s.image_ids) == intervals(s, 200)


def test_seeds_widen_the_interval() -> None:
    values = np.random.default_rng(0).random(200)
    same = estimates([ratio(values), ratio(values)])["accuracy"]
    apart = estimates([ratio(values), ratio(np.clip(values + 0.1, 0, 1))])["accuracy"]
    assert same.se_seeds == 0
    assert apart.se_seeds == pytest.approx(
        100 * np.std([0, (np.clip(values + 0.1, 0, 1) - values).mean()], ddof=1) / math.sqrt(2)
    )
    assert apart.high - apart.low > same.high - same.low


def test_degenerate_sets() -> None:
    perfect = ratio(np.ones(30))
    assert intervals(perfect)["accuracy"] == (100.0, 100.0)
    low, high = intervals(ratio(np.ones(1)))["accuracy"]
    assert math.isnan(low)
    assert math.isnan(high)
    nothing = RatioStatistics(("a", "b"), np.zeros((2, 1)), np.zeros((2, 1)), ("accuracy",))
    assert math.isnan(intervals(nothing)["accuracy"][0])
    assert math.isnan(combine(np.array([math.nan]), np.zeros(5), np.zeros(5)).low)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(0, 3))
def test_intervals_hold_the_estimate_and_stay_in_range(values: list[float], seed: int) -> None:
    found = estimates(ratio(np.array(values)), resamples=200, seed=seed)["accuracy"]
    assert 0 <= found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high <= 100


@pytest.mark.parametrize("freedom", [1, 1.4, 2, 3, 5, 10, 50, 199, 1e7])
def test_student_against_scipy(freedom: float) -> None:
    for p in (1e-6, 0.005, 0.025, 0.5, 0.9, 0.975, 0.995):
        assert student_quantile(p, freedom) == pytest.approx(scipy_stats.t.ppf(p, freedom), rel=1e-6, abs=1e-9)
    for t in (-40.0, -2.0, -0.01, 0.0, 0.3, 5.0):
        assert student_cdf(t, freedom) == pytest.approx(scipy_stats.t.cdf(t, freedom), rel=1e-6, abs=1e-300)
    assert student_cdf(1.0, math.inf) == pytest.approx(scipy_stats.norm.cdf(1.0))


def test_paired_against_itself_is_nothing() -> None:
    found = paired(iou(), iou())["miou"]
    assert (found.difference, found.low, found.high, found.se) == (0, 0, 0, 0)
    assert found.p == found.p_worse == 1.0


def test_paired_sees_what_unpaired_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(200) * 0.8
    a, b = ratio(values), ratio(values - 0.005 + rng.normal(0, 0.01, 200))
    found = paired(a, b)["accuracy"]
    assert found.drop == pytest.approx(0.5, abs=0.2)
    assert found.p_worse < 0.001
    alone = intervals(a)["accuracy"]
    assert alone[0] < found.b < alone[1]
    assert found.low < found.difference < found.high < 0


def test_permutation_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.random(40), rng.random(40) + 0.06
    found = paired(ratio(x), ratio(y), permutations=20_000)["accuracy"]
    expected = scipy_stats.permutation_test(
        (x, y),
        lambda a, b, axis: np.mean(b - a, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
    )
    assert found.test == "permutation"
    assert found.p == pytest.approx(expected.pvalue, abs=0.02)


def test_paired_direction_of_error_rates() -> None:
    n = 100
    errors = np.random.default_rng(0).random(n)
    make = lambda v: RatioStatistics(tuple(map(str, range(n))), v[:, None], np.ones((n, 1)), ("cer",))  # noqa: E731
    found = paired(make(errors), make(errors + 0.05))["cer"]
    assert not found.higher_is_better
    assert found.drop == pytest.approx(5.0)
    assert found.p_worse < 0.01


def test_seeds_on_both_sides() -> None:
    runs = [make_statistics(seed=s) for s in range(4)]
    found = paired(runs[:2], runs[2:])["accuracy"]
    assert found.test == "bootstrap"
    assert found.low < found.difference < found.high
    assert found.a == pytest.approx(np.mean([r.point()["accuracy"] for r in runs[:2]]))


def test_other_images_are_refused() -> None:
    values = np.random.default_rng(0).random(5)
    with pytest.raises(ValueError, match="is in one only"):
        paired(ratio(values), ratio(values, ("i0", "i1", "i2", "i3", "x")))
    with pytest.raises(ValueError, match="order differs"):
        paired(ratio(values), ratio(values, ("i1", "i0", "i2", "i3", "i4")))


def test_holm_against_the_definition() -> None:
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_and_keeps_order(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(a >= p for a, p in zip(adjusted, values))
    assert [adjusted[k] for k in np.argsort(values, kind="stable")] == sorted(adjusted)


def test_detectable_drop() -> None:
    one, z = Spread(((1.0, math.inf),)), scipy_stats.norm.ppf
    assert detectable_drop(one) == pytest.approx(z(0.95) + z(0.8))
    assert detectable_drop(one, margin=3.0) == pytest.approx(3.0 + z(0.8))
    assert detectable_drop(Spread(()), margin=0.5) == 0.5
    assert detectable_drop(Spread(((1.0, 3),))) == pytest.approx(sum(scipy_stats.t.ppf((0.95, 0.8), 3)))


def test_a_spread_of_two_sources() -> None:
    both, t = Spread(((4.0, 200), (1.0, 2))), scipy_stats.t.ppf
    assert both.se == pytest.approx(math.sqrt(5))
    for p in (0.001, 0.2, 0.8, 0.95):
        expected = math.copysign(math.hypot(2 * t(p, 200), t(p, 2)), p - 0.5)
        assert both.quantile(p) == pytest.approx(expected, rel=1e-6)
        assert both.cdf(expected) == pytest.approx(p, rel=1e-6)
    assert Spread(((1.0, 5), (0.0, 1))).cdf(-2.0) == pytest.approx(scipy_stats.t.cdf(-2, 5))


def test_false_alarms_of_the_permutation_test() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for k in range(200):
        values = rng.random(50)
        a, b = (ratio(values + rng.normal(0, 0.1, 50)) for _ in range(2))
        alarms += paired(a, b, resamples=50, permutations=200, seed=k)["accuracy"].p_worse <= 0.05
    assert alarms <= 20  # 10 expected, standard deviation 3.1


def test_every_swap_of_a_small_set_is_counted() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random(9), rng.random(9) - 0.2
    found = paired(ratio(x), ratio(y), permutations=1000)["accuracy"]
    nulls = [float(np.mean((y - x) * (1 - 2 * np.array(s)))) for s in itertools.product((0, 1), repeat=9)]
    gain = float(np.mean(y - x))
    assert found.p_worse == np.mean([n <= gain + 1e-12 for n in nulls])
    assert found.p == np.mean([abs(n) >= abs(gain) - 1e-12 for n in nulls])
    assert found.p_floor == 0.5**9


def test_a_set_that_can_never_be_significant_says_so() -> None:
    found = paired(ratio(np.full(4, 0.8)), ratio(np.array([0.5, 0.49, 0.51, 0.5])))["accuracy"]
    assert found.p_worse == found.p_floor == 1 / 16
    assert found.detectable(alpha=0.05) == math.inf
    assert math.isfinite(found.detectable(alpha=0.1))


def test_swaps_go_on_where_the_level_asks_for_more() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(100)
    a, worse, alike = ratio(values), ratio(values - 0.1), ratio(values + rng.normal(0, 0.1, 100))
    coarse = paired(a, worse, permutations=200)["accuracy"]
    assert coarse.p_worse == coarse.p_floor == 1 / 201
    fine = paired(a, worse, permutations=200, finest=0.001)["accuracy"]
    assert fine.p_worse == fine.p_floor == 1 / 10_001
    assert (
        paired(a, alike, permutations=200, finest=0.001)["accuracy"].p
        == paired(a, alike, permutations=200)["accuracy"].p
    )


def test_the_direction_may_be_given() -> None:
    values = np.random.default_rng(0).random(60)
    found = paired(ratio(values), ratio(values + 0.1), directions={"accuracy": False})["accuracy"]
    assert found.drop == pytest.approx(10)
    assert found.p_worse < 0.01


@pytest.mark.parametrize(("seeds_a", "seeds_b"), [(2, 2), (3, 3), (5, 5), (3, 1), (1, 2), (2, 5)])
def test_false_alarms_of_seeds(seeds_a: int, seeds_b: int) -> None:
    rng = np.random.default_rng(seeds_a)
    one = two = 0
    for _ in range(200):
        images = rng.uniform(0.3, 0.7, 30)
        runs = [
            ratio(np.clip(images + rng.normal(0, 0.01) + rng.normal(0, 0.02, 30), 0, 1))
            for _ in range(seeds_a + seeds_b)
        ]
        found = paired(runs[:seeds_a], runs[seeds_a:], resamples=50)["accuracy"]
        one, two = one + (found.p_worse <= 0.05), two + (found.p <= 0.05)
        assert (found.notes != ()) == (1 in (seeds_a, seeds_b))
    assert max(one, two) <= 19  # 10 expected at most, standard deviation 3.1


def test_seeds_widen_the_interval_of_a_difference_to_students() -> None:
    runs = [ratio(np.full(50, v)) for v in (0.50, 0.52, 0.51, 0.53)]
    found = paired(runs[:2], runs[2:])["accuracy"]
    expected = scipy_stats.ttest_ind([51, 53], [50, 52], equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.low == pytest.approx(expected.confidence_interval().low, rel=1e-6)


def test_one_image_gives_no_interval() -> None:
    found = paired(ratio(np.ones(1)), ratio(np.zeros(1)))["accuracy"]
    assert math.isnan(found.low)
    assert found.p == 1.0
    assert found.p_worse == 0.5


def test_coverage_of_the_mean_iou() -> None:
    rng = np.random.default_rng(0)
    whole = iou(n=3000, classes=8, seed=1, skill=0.6)
    truth = whole.point()["miou"]
    inside = 0
    for k in range(200):
        pick = rng.integers(0, 3000, 100)
        areas = whole.areas[pick]
        drawn = IoUStatistics.__new__(IoUStatistics)  # the matrix of a subset is not known, and no metric reads it
        drawn.image_ids, drawn.classes, drawn.areas = tuple(map(str, range(100))), whole.classes, areas
        low, high = intervals(drawn, resamples=400, seed=k)["miou"]
        inside += low <= truth <= high
    assert 180 <= inside <= 199  # 190 expected, standard deviation 3.1


def test_built_in_kinds_are_found_by_name_without_torch() -> None:
    code = (
        "import sys\nfrom rice_eval.metrics import statistics as s\n"
        "for kind in (*s._MODULES, 'ratio'):\n    kind in s._KINDS or s._import_kind(kind)\n    assert s._KINDS[kind].kind == kind\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_intervals_are_cut_to_what_a_metric_can_be() -> None:
    assert in_range("recall", -0.1, 101.0) == (0.0, 100.0)
    assert in_range("cer", -0.1, 120.0) == (0.0, 120.0)
    assert in_range("seconds", -0.1, 120.0) == (-0.1, 120.0)
