"""Scores of text against rapidfuzz, jiwer, scikit-learn, and rules written out plainly."""

from __future__ import annotations

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from rice_eval.metrics.statistics import statistics_from_arrays
from rice_eval.metrics.text import LINE_METRICS, anls, distance, line_sums, normalise, one_minus_ned, word_distance
from rice_eval.metrics.text_boxes import convex, match, smallest_rectangle
from rice_eval.metrics.text_statistics import TextSums
from rice_eval.results.bootstrap import intervals

words = st.lists(
    st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=6), min_size=1, max_size=6
)


@given(st.text(max_size=30), st.text(max_size=30))
def test_distances_equal_rapidfuzz(truth: str, read: str):
    assert distance(truth, read) == Levenshtein.distance(truth, read)
    assert one_minus_ned(truth, read) == pytest.approx(Levenshtein.normalized_similarity(truth, read))


@settings(max_examples=200)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=5))
def test_error_rates_equal_jiwer(pairs: list[tuple[list[str], list[str]]]):
    truths, reads = [" ".join(t) for t, _ in pairs], [" ".join(r) for _, r in pairs]
    sums = TextSums(LINE_METRICS)
    for k, (truth, read) in enumerate(zip(truths, reads)):
        score = line_sums(truth, read)
        sums.add(str(k), score.numerators, score.denominators)
        assert word_distance(truth, read) / len(truth.split()) == pytest.approx(jiwer.wer(truth, read))
    point = sums.statistics().point()
    assert point["cer"] == pytest.approx(100 * jiwer.cer(truths, reads))
    assert point["wer"] == pytest.approx(100 * jiwer.wer(truths, reads))


def test_anls_by_hand():
    assert anls(["$1,000.00"], "$1,000.00") == 1
    assert anls(["Paris", "paris, france"], " PARIS ") == pytest.approx(1)
    assert anls(["abcd"], "abcx") == pytest.approx(0.75)
    assert anls(["abcd"], "abxy") == 0.5  # kept at the threshold, as lmms-eval does
    assert anls(["abcd"], "axyz") == 0
    assert anls([""], "") == 1
    # The distance is of the cleaned strings, the length of those given: one edit over six characters.
    assert anls(["ab  cd"], "ab ce") == pytest.approx(1 - 1 / 6)
    with pytest.raises(ValueError, match="answer"):
        anls([], "x")


@given(st.lists(st.text(max_size=12), min_size=1, max_size=4), st.text(max_size=12))
def test_anls_is_the_published_definition_where_no_blanks_are_cleaned(answers: list[str], read: str):
    answers, read = ["".join(a.lower().split()) for a in answers], "".join(read.lower().split())
    best = max(Levenshtein.normalized_similarity(a, read) for a in answers)
    if min(Levenshtein.normalized_distance(a, read) for a in answers) != 0.5:
        assert anls(answers, read) == pytest.approx(best if best > 0.5 else 0.0)


def test_normalise_keeps_ascii_letters_and_digits():
    assert normalise("Café-No. 7 ÅB") == "cafno7b"
    assert line_sums("HELLO!", "hello").numerators[:2] == (1.0, 0.0)
    assert line_sums("--", "++").numerators[0] == 0.0


def _clipped(a: np.ndarray, b: np.ndarray) -> float:
    """Area of the intersection of two convex clockwise (y down) polygons, by Sutherland and Hodgman's clipping."""
    points = [tuple(p) for p in a]
    for p, q in zip(b, np.roll(b, -1, axis=0)):

        def side(r, p=p, q=q):
            return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

        out = []
        for r, s in zip(points, points[1:] + points[:1]):
            if side(r) >= 0:
                out.append(r)
            if side(r) * side(s) < 0:
                t = side(r) / (side(r) - side(s))
                out.append((r[0] + t * (s[0] - r[0]), r[1] + t * (s[1] - r[1])))
        points = out
        if not points:
            return 0.0
    return _area(np.array(points))


def _area(p: np.ndarray) -> float:
    x, y = p.T
    return abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))) / 2


def _plainly(truth: list[np.ndarray], ignore: list[bool], found: list[np.ndarray]) -> tuple[int, int, int]:
    """The rule of ICDAR 2015, written as loops over every pair."""
    dropped = set()
    for j, f in enumerate(found):
        for t, skip in zip(truth, ignore):
            if skip and _clipped(t, f) / _area(f) > 0.5:
                dropped.add(j)
    hits, used_t, used_f = 0, set(), set()
    for i, t in enumerate(truth):
        for j, f in enumerate(found):
            if ignore[i] or j in dropped or i in used_t or j in used_f:
                continue
            inter = _clipped(t, f)
            if inter / (_area(t) + _area(f) - inter) > 0.5:
                hits, used_t, used_f = hits + 1, used_t | {i}, used_f | {j}
    return hits, ignore.count(False), len(found) - len(dropped)


def _quad(rng: np.random.Generator, near: np.ndarray | None = None) -> np.ndarray:
    if near is not None:
        return convex(near + rng.normal(0, 2.5, near.shape))
    centre, size = rng.uniform(10, 60, 2), rng.uniform((8, 4), (30, 14))
    angle = rng.uniform(-0.6, 0.6)
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * size / 2
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    return corners @ turn + centre


@pytest.mark.parametrize("seed", range(60))
def test_hmean_counts_equal_the_rule_written_plainly(seed: int):
    rng = np.random.default_rng(seed)
    truth = [_quad(rng) for _ in range(rng.integers(0, 8))]
    ignore = [bool(v) for v in rng.random(len(truth)) < 0.3]
    found = [_quad(rng, t) for t in truth if rng.random() < 0.8] + [_quad(rng) for _ in range(rng.integers(0, 4))]
    result = match(truth, ignore, found)
    assert (len(result.pairs), len(result.truths), len(result.found)) == _plainly(truth, ignore, found)


def test_rule_takes_bow_ties_and_empty_polygons():
    tie = np.array([(0, 0), (10, 10), (10, 0), (0, 10)], float)
    flat = np.array([(0, 0), (5, 0), (10, 0)], float)
    box = np.array([(0, 0), (10, 0), (10, 10), (0, 10)], float)
    assert match([tie, box], [False, False], [flat, box]).pairs == ((1, 1),)


def test_smallest_rectangle_starts_at_the_top_left():
    box = np.array([(2, 1), (12, 1), (12, 4), (2, 4)], float)
    assert np.allclose(smallest_rectangle(box[[2, 0, 3, 1]]), box)
    assert smallest_rectangle(np.array([(0, 0), (1, 1)], float)) is None


def test_statistics_survive_storage_and_group():
    sums = TextSums(("cer",))
    sums.add("a", (1,), (10,), ("small",))
    sums.add("b", (3,), (10,), ("small", "turned"))
    sums.image("c")
    made = sums.statistics()
    again = statistics_from_arrays("text", made.arrays())
    assert again.image_ids == ("a", "b", "c")
    assert again.point() == {"cer": pytest.approx(20)}
    assert again.per_class() == {"cer": {"small": pytest.approx(20), "turned": pytest.approx(30)}}
    assert again.concat(made).per_class() == again.per_class()
    other = TextSums(("cer",))
    other.add("d", (2,), (4,), ("long", "small"))
    both = made.concat(other.statistics())
    assert both.groups == ("small", "turned", "long")
    assert both.per_class() == {
        "cer": {"small": pytest.approx(25), "turned": pytest.approx(30), "long": pytest.approx(50)}
    }
    assert both.by_group("cer").values(np.array([[0.0, 1, 0, 1]])) == {
        "small": [pytest.approx(100 * 5 / 14)], "turned": [pytest.approx(30)], "long": [pytest.approx(50)],
    }  # fmt: skip
    with pytest.raises(ValueError, match="wer"):
        both.by_group("wer")


def test_groups_have_intervals():
    """A group's value is bootstrapped over images like the metric itself, and holds the truth about as often as it says."""
    rng = np.random.default_rng(0)
    sums = TextSums(("word_accuracy",))
    for image in range(200):
        for height, chance in (("height 5 px", 0.2), ("height 20 px", 0.8)):
            sums.add(str(image), (float(rng.random() < chance),), (1,), (height,))
    made = sums.statistics()
    bounds = intervals(made.by_group("word_accuracy"), resamples=500)
    assert made.by_group("word_accuracy").point() == pytest.approx(made.per_class()["word_accuracy"])
    low, high = bounds["height 5 px"]
    assert low < 20 < high < 40
    low, high = bounds["height 20 px"]
    assert 60 < low < 80 < high


def test_edits_over_no_character_are_undefined():
    sums = TextSums(("cer",))
    sums.add("blank", (3.0,), (0.0,))
    assert np.isnan(sums.statistics().point()["cer"])
    sums.add("page", (1.0,), (4.0,))
    assert sums.statistics().point()["cer"] == 100.0
