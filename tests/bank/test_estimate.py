from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bank_fakes import FakeDataset, FakeEncoder, source
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.bank.estimate import (
    SIZING_ENCODERS,
    VitShape,
    estimate_pass,
    flop_rate,
    measure_rate,
    sizing_table,
    vit_flops,
)
from rice_eval.errors import BankError


def test_a_pass_is_estimated_from_what_is_missing(tmp_path: Path):
    data = FakeDataset(20, ((16, 16), (20, 24)))
    made = source(tmp_path, data, view="native")
    before = estimate_pass(made, 10.0)
    assert (before.images, before.present, before.present_bytes, before.seconds) == (20, 0, 0, 2.0)
    assert before.tokens == 10 * 16 + 10 * 30
    assert before.bytes == before.tokens * 8 * 2 * 2
    made.extract((0, 4))
    after = estimate_pass(source(tmp_path, data, view="native"))
    assert after.present == 8
    assert after.seconds is None
    assert 0 < after.present_bytes < made.bytes * 2
    made.extract()
    assert estimate_pass(source(tmp_path, data, view="native"), 1.0).seconds == 0
    # The estimate counts patch tokens; headers, grids and class tokens come on top.
    assert before.bytes < made.bytes


def test_operations_agree_with_counted_ones():
    counted = load_encoder("random-vit-s-14").flops(448, 448)
    assert counted is not None
    assert vit_flops(VitShape("ViT-S/14", 12, 384, 14, 448)) == pytest.approx(counted, rel=0.02)


def test_a_view_of_several_frames_takes_as_long_as_its_frames(tmp_path: Path):
    data = FakeDataset(4, ((16, 16), (16, 32)))
    assert source(tmp_path, data).frames_per_image == 1
    slid = source(tmp_path, data, view="native,slide=16,crop=16")
    assert slid.frame_size == (16, 16)
    assert slid.frames_per_image == 1.5
    assert source(tmp_path, data, view="native").frames_per_image == 1.5


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path):
    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    encoder = FakeEncoder(spoil)
    assert measure_rate(encoder, (16, 16), batch_size=9, seconds=0.0) > 0
    assert encoder.batches == [9, 4, 2, 2]


def test_no_memory_for_one_frame():
    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        raise MemoryError

    with pytest.raises(BankError, match="no memory on cpu for one frame of 16 x 16 px through encoder 'fake'"):
        measure_rate(FakeEncoder(spoil), (16, 16), batch_size=2)


def test_rates_are_positive_and_the_table_scales_with_them():
    rate = measure_rate(FakeEncoder(), (16, 16), batch_size=2, seconds=0.01)
    assert rate > 0
    one, two = sizing_table(flop_rate(rate, 1000)), sizing_table(flop_rate(2 * rate, 1000))
    assert len(one) == 3 * len(SIZING_ENCODERS)
    for slow, fast in zip(one, two):
        assert slow.hours[1] == pytest.approx(2 * fast.hours[1]) == pytest.approx(64 * slow.hours[64])
        assert slow.bytes_fp16 / slow.bytes_int8 == pytest.approx(2, rel=0.02)
