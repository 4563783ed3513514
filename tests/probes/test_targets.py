"""The identity behind token targets, against pixels."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from rice_eval.metrics.iou import areas_of, confusion
from rice_eval.probes.targets import (
    TargetStore,
    cell_histograms,
    concatenate,
    token_areas,
    token_histograms,
    token_loss,
)

IGNORE = -1


@given(
    st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.integers(2, 6),
    st.integers(0, 6), st.integers(0, 6),
)  # fmt: skip
def test_token_loss_and_gradient_equal_pixel_loss(seed, gh, gw, patch, classes, cut_h, cut_w):
    """Nearest upsampling, ignored pixels, and patches that the image's border cuts (padding is ignored)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, classes, (gh * patch, gw * patch))
    labels[labels.shape[0] - min(cut_h, patch - 1) :] = IGNORE
    labels[:, labels.shape[1] - min(cut_w, patch - 1) :] = IGNORE
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(gh * gw, classes, dtype=torch.float64, generator=generator, requires_grad=True)
    counts = token_histograms(labels, (gh, gw), IGNORE).dense(classes)
    loss = token_loss(tokens, counts.double())
    (gradient,) = torch.autograd.grad(loss, tokens)
    if not (labels != IGNORE).any():
        assert loss == 0
        return
    grown = tokens.T.reshape(1, classes, gh, gw).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    expected = F.cross_entropy(grown, torch.from_numpy(labels)[None], ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, tokens)[0], atol=1e-9, rtol=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.integers(9, 40), st.integers(9, 40))
def test_grids_that_do_not_divide_the_frame(seed, gh, gw, h, w):
    """A pixel belongs to the token that nearest upsampling (at pixel centres) would show there."""
    # A centre that falls on the line between two tokens is equally near to both, and floating point decides in torch.
    for side, tokens in ((h, gh), (w, gw)):
        assume(((2 * np.arange(side) + 1) * tokens % (2 * side) != 0).all())
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 4, (h, w))
    place = torch.arange(gh * gw, dtype=torch.float64).view(1, 1, gh, gw)
    owner = F.interpolate(place, size=(h, w), mode="nearest-exact")[0, 0].long().numpy()
    targets = token_histograms(labels, (gh, gw), IGNORE)
    expected = np.zeros((gh * gw, 4))
    for c in range(4):
        np.add.at(expected[:, c], owner[labels == c], 1)
    np.testing.assert_array_equal(targets.dense(4).numpy(), expected)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_cells_stand_token_by_token(seed, gh, gw, side, pixels):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 3, (gh * side * pixels, gw * side * pixels))
    targets = cell_histograms(labels, (gh, gw), side, IGNORE)
    parts = labels.reshape(gh, side, pixels, gw, side, pixels).transpose(0, 3, 1, 4, 2, 5).reshape(-1, pixels * pixels)
    expected = np.stack([(parts == c).sum(axis=1) for c in range(3)], axis=1)
    np.testing.assert_array_equal(targets.dense(3).numpy(), expected)
    assert (np.diff(targets.tokens) >= 0).all()


def test_areas_equal_those_of_the_nearest_upsampled_map():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 5, (12, 20))
    predicted = rng.integers(0, 5, (3 * 5, 2))
    counts = token_histograms(labels, (3, 5), IGNORE).dense(5)
    found = token_areas(torch.from_numpy(predicted), counts)
    for head in range(2):
        grown = predicted[:, head].reshape(3, 5).repeat(4, axis=0).repeat(4, axis=1)
        expected = areas_of(confusion(grown, labels, 5, IGNORE))
        np.testing.assert_array_equal(found[head].numpy(), expected)
        np.testing.assert_array_equal(token_areas(torch.from_numpy(predicted[:, head]), counts).numpy(), expected)


def test_store_gives_back_what_it_took():
    rng = np.random.default_rng(1)
    store = TargetStore()
    kept = {}
    for index in (4, 0, 9):
        frames = [token_histograms(rng.integers(-1, 3, (8, 8)), (2, 2), IGNORE) for _ in range(index % 3 + 1)]
        kept[index] = concatenate(frames)
        store.add(index, kept[index])
    for index, targets in kept.items():
        assert index in store
        assert torch.equal(store[index].dense(3), targets.dense(3))
    assert 1 not in store
    store.add(2, token_histograms(np.full((4, 4), IGNORE), (2, 2), IGNORE))
    assert store[2].dense(3).sum() == 0
