"""The report's facts of detections: curves whose area is AP50, a confusion matrix counted by hand, plain JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_coco import random_set
from test_tide_and_referring import FAR, NEAR_C, A, B, C, found_of, truth_of

from rice_eval.metrics.coco import ap_statistics
from rice_eval.metrics.detection_analysis import MATRIX_CLASSES, analysis_of, confusions


@pytest.mark.parametrize("seed", range(4))
def test_the_area_under_the_curves_is_ap(seed):
    truth, found = random_set(seed, images=15)
    statistics = ap_statistics([str(i) for i in range(15)], truth, found, list("abcd"))
    point = statistics.point()
    curves = statistics.curves()
    assert curves.shape == (10, 101)
    assert 100 * curves[0].mean() == pytest.approx(point["ap50"])
    assert 100 * curves.mean() == pytest.approx(point["ap"])
    assert (np.diff(curves, axis=1) <= 1e-12).all()


def test_confusions_are_counted_one_to_one():
    truth = truth_of([A, B, C], [0, 1, 2])
    # The three surest count: A right, B taken for class 0, one on the background; the fourth is not looked at.
    found = found_of([A, B, FAR, C], [0, 0, 2, 2])
    want = np.zeros((4, 4), int)
    want[0, 0] = want[1, 0] = want[3, 2] = want[2, 3] = 1
    assert confusions([truth], [found], 3).tolist() == want.tolist()
    assert confusions([truth], [found_of([NEAR_C], [2])], 3)[3, 2] == 1  # IoU 1/3 is no hit
    crowd = truth_of([A, [200, 200, 260, 260]], [0, 1], [False, True])
    assert confusions([crowd], [found_of([[210, 210, 220, 220]], [1])], 2).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_the_analysis_is_plain_json_whatever_the_number_of_classes():
    truth, found = random_set(1, images=8)
    ids = [str(i) for i in range(8)]
    few = analysis_of(truth, found, ap_statistics(ids, truth, found, list("abcd")))
    assert json.loads(json.dumps(few, allow_nan=False)) == few
    assert len(few["confusion"]["matrix"]) == 5
    many = [str(k) for k in range(MATRIX_CLASSES + 1)]
    truth, found = [truth_of([A, B, C], [0, 1, 2])] * 2, [found_of([A, B, C], [1, 2, 2])] * 2
    statistics = ap_statistics(["a", "b"], truth, found, many)
    assert analysis_of(truth, found, statistics)["confusion"] == {"pairs": [[0, 1, 2], [1, 2, 2]]}
