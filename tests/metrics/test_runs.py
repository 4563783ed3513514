from __future__ import annotations

import numpy as np
import pytest

from rice_eval.metrics.runs import check_runs, decode_runs


def test_runs_equal_those_that_pycocotools_wrote() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0) * 10:
        height, width = (int(v) for v in rng.integers(1, 200, 2))
        mask = (rng.random((height, width)) < share).astype(np.uint8)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"]
        runs = decode_runs(counts)
        check_runs(runs, height, width)
        assert runs == decode_runs(counts.decode())
        assert coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"] == counts


@pytest.mark.parametrize("counts", [None, 3, "é", "P", " "])
def test_counts_that_are_none(counts: object) -> None:
    with pytest.raises(ValueError, match="counts"):
        decode_runs(counts)


@pytest.mark.parametrize("runs", [[3, 2], [7], [3, -1, 4], [3.0, 3.0], ["6"], [None]])
def test_runs_that_do_not_fill_the_image(runs: list[object]) -> None:
    with pytest.raises(ValueError, match="run"):
        check_runs(runs, 2, 3)
