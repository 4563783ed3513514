"""FCOS's targets against a plain loop, its losses against torchvision's, and boxes there and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from rice_eval.probes.fcos import Level, Targets, assign, decode, fcos_loss, level_ranges, locations, suppress
from rice_eval.probes.fcos_heads import LinearFcos, PyramidFcos, pyramid_levels
from rice_eval.probes.pyramid import PlainPyramid, SimplePyramid, check_scales


def plain_assign(levels, boxes, labels, ignored, radius):
    """Location by location, as the paper words it."""
    out = []
    for level in levels:
        sy, sx = level.stride
        for i in range(level.grid[0]):
            for j in range(level.grid[1]):
                x, y = (j + 0.5) * sx, (i + 0.5) * sy
                best = None
                for n, (x1, y1, x2, y2) in enumerate(boxes):
                    sides = (x - x1, y - y1, x2 - x, y2 - y)
                    near = max(abs(x - (x1 + x2) / 2) / sx, abs(y - (y1 + y2) / 2) / sy) < radius or radius == 0
                    if min(sides) > 0 and near and level.low < max(sides) <= level.high:
                        area = (x2 - x1) * (y2 - y1)
                        if best is None or area < best[0]:
                            best = (area, n, sides)
                if best is None:
                    hidden = any(x1 < x < x2 and y1 < y < y2 for x1, y1, x2, y2 in ignored)
                    out.append((-2 if hidden else -1, (1.0,) * 4, 0.0))
                else:
                    left, top, right, bottom = best[2]
                    centre = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
                    out.append((labels[best[1]], (left / sx, top / sy, right / sx, bottom / sy), centre))
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.5]))
def test_targets_equal_a_plain_loop(seed, radius):
    rng = np.random.default_rng(seed)
    levels = pyramid_levels((5, 7), (60, 84), (2.0, 1.0, 0.5), 4.0)

    def boxes(n):
        start = rng.uniform(-5, 60, (n, 2))
        return np.concatenate([start, start + rng.uniform(0.5, 50, (n, 2))], 1).astype(np.float32)

    mine, hidden = boxes(int(rng.integers(0, 6))), boxes(int(rng.integers(0, 2)))
    labels = rng.integers(0, 4, len(mine))
    got = assign(levels, torch.from_numpy(mine), torch.from_numpy(labels), torch.from_numpy(hidden), radius)
    want = plain_assign(levels, mine.tolist(), labels.tolist(), hidden.tolist(), radius)
    assert got.label.tolist() == [w[0] for w in want]
    torch.testing.assert_close(got.distance, torch.tensor([w[1] for w in want]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.centreness, torch.tensor([w[2] for w in want]), atol=1e-4, rtol=1e-4)


def test_losses_equal_torchvisions():
    generator = torch.Generator().manual_seed(0)
    classes, count = 3, 40
    outputs = torch.randn(1, count, classes + 5, generator=generator)
    label = torch.randint(-2, classes, (count,), generator=generator)
    distance = torch.rand(count, 4, generator=generator) * 5 + 0.1
    centre = torch.rand(count, generator=generator)
    losses = fcos_loss(outputs, Targets(label, distance, centre), 0.25, 2.0)
    keep = label > -2
    truth = torch.zeros(int(keep.sum()), classes)
    for row, k in enumerate(label[keep].tolist()):
        if k >= 0:
            truth[row, k] = 1
    want = sigmoid_focal_loss(outputs[0, keep, :classes], truth, 0.25, 2.0, reduction="sum")
    torch.testing.assert_close(losses.classes[0], want)
    positive = label >= 0

    def xyxy(d):
        return torch.cat([-d[:, :2], d[:, 2:]], 1)

    found = outputs[0, positive, classes : classes + 4].exp()
    giou = generalized_box_iou(xyxy(found), xyxy(distance[positive])).diagonal()
    torch.testing.assert_close(losses.boxes[0], ((1 - giou) * centre[positive]).sum())
    assert losses.positives == int(positive.sum())
    both = losses + losses
    torch.testing.assert_close(both.total(), losses.total())


def test_perfect_outputs_decode_to_the_boxes():
    levels = pyramid_levels((8, 8), (112, 112), (2.0, 1.0), 8.0)
    boxes = torch.tensor([[10.0, 12, 40, 47], [50, 50, 111, 100], [60, 8, 70, 20]])
    labels = torch.tensor([0, 2, 1])
    targets = assign(levels, boxes, labels, torch.zeros(0, 4), 0.0)
    outputs = torch.full((len(targets.label), 3 + 5), -20.0)
    positive = targets.label >= 0
    rows = torch.nonzero(positive)[:, 0]
    outputs[rows, targets.label[rows]] = 20.0
    outputs[:, 3:7] = targets.distance.log()
    outputs[rows, 7] = torch.logit(targets.centreness[rows].clamp(1e-4, 1 - 1e-4))
    found = suppress(*decode(outputs, levels, 0.05, 1000), 0.6, 100)
    assert len(found[0]) == 3
    order = found[2].argsort()
    torch.testing.assert_close(found[0][order], boxes[labels.argsort()], atol=1e-3, rtol=0)


def test_linear_heads_train_as_torchs_adamw_and_export_what_they_say():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(30, 6, generator=generator) * 3 + 1
    mean, scale = tokens.mean(0), 1 / tokens.std(0)
    targets = Targets(
        torch.randint(-1, 2, (30,), generator=generator),
        torch.rand(30, 4, generator=generator) + 0.5,
        torch.rand(30, generator=generator),
    )
    heads = LinearFcos(mean, scale, 2, (1e-2, 3e-3), (0.0, 0.1), (0.9, 0.999), torch.device("cpu"))
    twin = torch.nn.Linear(6, 7)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.copy_(heads.bias[0, 7:])
    groups = [{"params": [twin.weight], "weight_decay": 0.1}, {"params": [twin.bias], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=3e-3)
    losses = []
    for _ in range(20):
        x, out = heads.forward(tokens)
        out.requires_grad_()
        loss = fcos_loss(out, targets, 0.25, 2.0).total()
        heads.step(x, torch.autograd.grad(loss.sum(), out)[0], 1.0)
        losses.append(float(loss[0].detach()))
        optimiser.zero_grad()
        fcos_loss(twin((tokens - mean) * scale)[None], targets, 0.25, 2.0).total().sum().backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    want = twin((tokens - mean) * scale).detach()
    torch.testing.assert_close(heads.export(1)(tokens), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_pyramids_have_the_shapes_their_levels_say(grid):
    scales = (4.0, 2.0, 1.0, 0.5, 0.25)
    levels = pyramid_levels(grid, (grid[0] * 14, grid[1] * 14), scales, 8.0)
    x = torch.randn(2, 16, *grid)
    for pyramid, width in ((SimplePyramid(16, 8, scales), 8), (PlainPyramid(scales), 16)):
        assert [tuple(m.shape) for m in pyramid(x)] == [(2, width, *level.grid) for level in levels]
    head = PyramidFcos(torch.zeros(16), torch.ones(16), 3, 8, 1, scales)
    assert head(x).shape == (2, sum(level.count for level in levels), 8)
    assert len(locations(levels)[0]) == sum(level.count for level in levels)
    # Without parameters nothing is made up: pooling and repeating give values of the map alone.
    assert set(PlainPyramid(scales)(x)[0].flatten().tolist()) == set(x.flatten().tolist())


def test_size_ranges_are_fcos_own():
    assert level_ranges([8, 16, 32, 64, 128], 8.0) == [
        (0, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, float("inf")),
    ]
    with pytest.raises(ValueError, match="falling powers"):
        check_scales((1.0, 2.0))


def test_boxes_without_a_location_are_counted():
    level = [Level((4, 4), (14.0, 14.0))]
    tiny = torch.tensor([[1.0, 1, 3, 3], [0, 0, 56, 56]])
    assert assign(level, tiny, torch.tensor([0, 1]), torch.zeros(0, 4), 0.0).missed == 1
