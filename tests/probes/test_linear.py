"""Heads side by side against torch's own optimiser and autograd, one head at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rice_eval.probes.linear import HeadGroup, Moments, warmup_cosine
from rice_eval.probes.targets import token_loss

CPU = torch.device("cpu")


def data(tokens: int = 64, dim: int = 5, classes: int = 3, steps: int = 6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, tokens, dim, generator=generator) * 3 + 7
    counts = torch.randint(0, 5, (steps, tokens, classes), generator=generator).float()
    counts[:, ::7] = 0  # tokens without labels
    return x, counts


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments(x.shape[-1])
    for part in x.reshape(-1, x.shape[-1]).split(50):
        moments.add(part)
    return moments


def test_heads_equal_torch_adamw_one_by_one():
    x, counts = data()
    rates, decays = (1e-2, 3e-3), (0.0, 0.3)
    group = HeadGroup(moments_of(x), 3, rates, decays, (0.9, 0.999), 1e-6, CPU)
    flat = x.reshape(-1, 5).double()
    mean, scale = flat.mean(0).float(), (flat.var(0, correction=0) + 1e-6).rsqrt().float()
    for head, (rate, decay) in enumerate(zip(rates, decays)):
        alone = nn.Linear(5, 3)
        nn.init.zeros_(alone.weight)
        nn.init.zeros_(alone.bias)
        optimiser = torch.optim.AdamW(
            [{"params": [alone.weight], "weight_decay": decay}, {"params": [alone.bias], "weight_decay": 0.0}], lr=rate
        )
        fresh = HeadGroup(moments_of(x), 3, (rate,), (decay,), (0.9, 0.999), 1e-6, CPU)
        for k in range(len(x)):
            factor = warmup_cosine(k, len(x), 2)
            for settings in optimiser.param_groups:
                settings["lr"] = rate * factor
            loss = token_loss(alone((x[k] - mean) * scale), counts[k])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            assert fresh.step(x[k], counts[k], factor)[0] == pytest.approx(loss.item(), rel=1e-5)
            if head == 0:
                group.step(x[k], counts[k], factor)
        expected = alone((x[0] - mean) * scale)
        torch.testing.assert_close(fresh.logits(x[0])[:, 0], expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(group.logits(x[0])[:, head], expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(group.export(head)(x[0]), expected, atol=1e-4, rtol=1e-4)


def test_cells_train_as_one_linear_layer_of_all_of_them():
    x, _ = data()
    counts = torch.randint(0, 5, (len(x), 64 * 4, 3), generator=torch.Generator().manual_seed(2)).float()
    counts[:, :40] = 0
    counts[:, 43::9] = 0
    moments = moments_of(x)
    mean, scale = moments.standardisation(1e-6)
    alone = nn.Linear(5, 12)
    nn.init.zeros_(alone.weight)
    nn.init.zeros_(alone.bias)
    optimiser = torch.optim.AdamW(alone.parameters(), lr=1e-2, weight_decay=0.0)
    group = HeadGroup(moments, 3, (1e-2,), (0.0,), (0.9, 0.999), 1e-6, CPU, cells=4)
    for k in range(len(x)):
        loss = token_loss(alone((x[k] - mean) * scale).reshape(-1, 3), counts[k])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert group.step(x[k], counts[k], 1.0)[0] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(group.export(0)(x[0]), alone((x[0] - mean) * scale), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(group.logits(x[0])[:, 0], group.export(0)(x[0]).reshape(-1, 3), atol=1e-4, rtol=1e-4)


def test_a_batch_without_labels_changes_nothing():
    x, _ = data()
    group = HeadGroup(moments_of(x), 3, (1e-2,), (0.1,), (0.9, 0.999), 1e-6, CPU)
    group.weight += 1
    before = group.weight.clone()
    assert group.step(x[0], torch.zeros(64, 3), 1.0).tolist() == [0.0]
    assert torch.equal(group.weight, before)


def test_moments_merge_and_survive_large_means():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(1)) * 0.1 + torch.tensor([0.0, 1e3, -50.0, 1.0])
    together = moments_of(x[:123]) + moments_of(x[123:])
    mean, scale = together.standardisation(0.0)
    torch.testing.assert_close(mean, x.double().mean(0).float())
    torch.testing.assert_close(scale, x.double().var(0, correction=0).rsqrt().float(), rtol=1e-3, atol=0)


def test_schedule():
    factors = [warmup_cosine(k, 10, 4) for k in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert warmup_cosine(0, 5, 0) == 1.0
