"""Region features against torchvision's own operator and against sums written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import Tokens
from rice_eval.adapters.regions import mask_pool, region_features, roi_align_tokens
from rice_eval.errors import PlanError, UsageError


def _tokens(b: int = 2, h: int = 5, w: int = 7, d: int = 3) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    return Tokens({4: torch.rand(b, h * w, d, generator=generator)}, {4: (h, w)})


BOXES = [torch.tensor([[0.1, 0.2, 0.55, 0.9], [0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.33, 0.4, 0.34, 0.41]])]


@pytest.mark.parametrize(("size", "ratio"), [(1, 0), (1, 2), (7, 2)])
def test_equals_torchvision_on_the_grid(size: int, ratio: int) -> None:
    from torchvision.ops import roi_align

    tokens = _tokens()
    grid = tokens.patches[4].reshape(2, 5, 7, 3).permute(0, 3, 1, 2).contiguous()
    rois = torch.cat(
        [
            torch.cat([torch.full((len(b), 1), float(i)), b * torch.tensor([7.0, 5, 7, 5])], 1)
            for i, b in enumerate(BOXES)
        ]
    )
    expected = roi_align(grid, rois, size, sampling_ratio=ratio, aligned=True).mean((2, 3))
    got = roi_align_tokens(tokens, BOXES, output_size=size, sampling_ratio=ratio)
    assert [len(g) for g in got] == [2, 1]
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-6, rtol=0)


def test_a_box_of_whole_tokens_is_their_mean() -> None:
    tokens = _tokens(b=1, h=4, w=4)
    box = torch.tensor([[0.25, 0.5, 1.0, 1.0]])
    expected = tokens.patches[4].reshape(4, 4, 3)[2:4, 1:4].mean((0, 1))
    torch.testing.assert_close(roi_align_tokens(tokens, [box])[0][0], expected)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 4:, 2:] = True
    torch.testing.assert_close(mask_pool(tokens, [mask])[0][0], expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 23), st.integers(1, 23), st.integers(0, 10**6))
def test_mask_weights_are_exact_areas(h: int, w: int, height: int, width: int, seed: int) -> None:
    """A mask of H x W pixels laid over h x w tokens, against both repeated to their common multiple."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, height, width, generator=generator) < 0.5
    mask[0, 0, 0] = True
    tokens = Tokens({1: torch.rand(1, h * w, 2, generator=generator)}, {1: (h, w)})
    fine_mask = mask[0].repeat_interleave(h, 0).repeat_interleave(w, 1)
    fine_tokens = tokens.patches[1][0].reshape(h, w, 2).repeat_interleave(height, 0).repeat_interleave(width, 1)
    torch.testing.assert_close(mask_pool(tokens, [mask])[0][0], fine_tokens[fine_mask].mean(0), atol=1e-5, rtol=1e-5)


def test_no_boxes_is_no_features() -> None:
    got = roi_align_tokens(_tokens(), [torch.zeros(0, 4), BOXES[1]])
    assert [tuple(g.shape) for g in got] == [(0, 3), (1, 3)]


def test_a_prompter_is_asked_and_only_where_there_is_one() -> None:
    encoder = load_encoder("rgb-moments")
    tokens = encoder.encode(torch.rand(1, 3, 28, 28))
    with pytest.raises(PlanError, match="no region head"):
        region_features(encoder, tokens, [BOXES[0]], "prompter")

    def own(_tokens: Tokens, boxes: list[Tensor]) -> list[Tensor]:
        return [b * 2 for b in boxes]

    encoder.region_features = own  # type: ignore[attr-defined]
    assert torch.equal(region_features(encoder, tokens, [BOXES[0]], "prompter")[0], BOXES[0] * 2)
    assert region_features(encoder, tokens, [BOXES[0]])[0].shape == (2, 6)
    assert region_features(encoder, tokens, [], "mask", masks=[torch.ones(3, 4, 4)])[0].shape == (3, 6)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([torch.rand(1, 4)], "1 lists of boxes for 2 images"),
        ([torch.zeros(1, 5), BOXES[1]], "not float"),
        ([torch.tensor([[0.0, 0, 224, 224]]), BOXES[1]], "leave 0 to 1"),
        ([torch.tensor([[0.5, 0.5, 0.5, 0.9]]), BOXES[1]], "without area"),
        ([torch.tensor([[0.5, 0.5, float("nan"), 0.9]]), BOXES[1]], "leave 0 to 1"),
    ],
)
def test_boxes_that_can_not_be_taken(boxes: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        roi_align_tokens(_tokens(), boxes)


def test_masks_that_can_not_be_taken() -> None:
    with pytest.raises(UsageError, match="covers nothing"):
        mask_pool(_tokens(), [torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    with pytest.raises(UsageError, match="need masks"):
        region_features(load_encoder("rgb-moments"), _tokens(), BOXES, "mask")
    with pytest.raises(PlanError, match="layer 3 was not encoded"):
        mask_pool(_tokens(), [torch.ones(1, 4, 4)] * 2, layer=3)
