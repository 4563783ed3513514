"""Schedules point by point, and against torch's and mmengine's own where they are installed."""

from __future__ import annotations

import math

import pytest
import torch

from rice_eval.protocols.schedules import SCHEDULES, schedule


def test_poly_is_torchs_without_warm_up():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.PolynomialLR(optimiser, 50, 0.9)
    factor = schedule("poly", 50, 0, 1e-6, 0.9)
    for step in range(50):
        assert factor(step) == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-12)
        optimiser.step()
        oracle.step()


def test_mmcv_warm_up_multiplies_the_falling_line():
    factor = schedule("poly", 40_000, 1500, 1e-6, 1.0)
    assert factor(0) == pytest.approx(1e-6)
    assert factor(750) == pytest.approx((1 - 750 / 40_000) * (1 - 0.5 * (1 - 1e-6)))
    assert factor(1500) == pytest.approx(1 - 1500 / 40_000)
    assert factor(39_999) == pytest.approx(1 / 40_000)


def test_dinov3_stays_for_a_step_then_anneals_over_all_steps():
    factor = schedule("one-cycle", 40_000, 1500, 1e-6, 1.0)
    assert factor(0) == factor(1) == pytest.approx(1e-6)
    assert factor(2) == pytest.approx((1 - (1 - 1 / 1500) * (1 - 1e-6)) * (1 - 1 / 40_000))
    assert factor(1501) == pytest.approx(0.5 * (1 + math.cos(math.pi * 1501 / 40_000)))
    assert factor(39_999) == pytest.approx(0.5 * (1 + math.cos(math.pi * 39_999 / 40_000)))


def test_cosine_ends_at_zero():
    factor = schedule("cosine", 100, 15, 0.0, 1.0)
    assert factor(0) == pytest.approx(1 / 15)
    assert factor(14) == 1.0
    assert factor(15) == 1.0
    assert factor(100) == pytest.approx(0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (7, 7), (30, 5)])
def test_factors_stay_in_range(name, steps, warmup):
    factor = schedule(name, steps, warmup, 1e-6, 0.9)
    assert all(0 <= factor(step) <= 1 for step in range(steps))


def test_poly_after_warm_up_is_mmengines():
    optim = pytest.importorskip("mmengine.optim", reason="mmengine is not installed (rice-eval[openmmlab])")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    warm = optim.LinearLR(optimiser, start_factor=1e-6, by_epoch=False, begin=0, end=15)
    fall = optim.PolyLR(optimiser, eta_min=0, power=1.0, begin=15, end=80, by_epoch=False)
    factor = schedule("poly-after-warmup", 80, 15, 1e-6, 1.0)
    for step in range(80):
        assert factor(step) == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-9), step
        optimiser.step()
        warm.step()
        fall.step()
