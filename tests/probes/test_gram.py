"""Closed forms against scikit-learn, and the algebra of sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from rice_eval.probes.gram import NEVER, GramSums, lda, ridge


def data(seed: int, tokens: int = 300, dim: int = 8, classes: int = 4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, tokens)
    labels[:classes] = np.arange(classes)
    x = rng.normal(size=(tokens, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=(classes, dim))[labels] * 2 + 5
    return torch.from_numpy(x).float(), labels


def sums_of(x: torch.Tensor, weights: torch.Tensor) -> GramSums:
    sums = GramSums.zeros(weights.shape[1], x.shape[1])
    for a, b in zip(x.split(77), weights.split(77)):
        sums.add(a, b)
    return sums


@given(st.integers(0, 500), st.sampled_from([1e-3, 0.1, 0.7, 1.0]))
def test_lda_equals_scikit_learn(seed: int, shrinkage: float):
    x, labels = data(seed)
    (head,) = lda(sums_of(x, torch.eye(4)[labels]), (shrinkage,), prior=True)
    # scikit-learn shrinks towards a scaled identity: the same thing once the within-class variances are one.
    exact = x.double().numpy()
    within = exact - np.stack([exact[labels == c].mean(0) for c in range(4)])[labels]
    scaled = exact / within.std(axis=0)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(scaled, labels)
    expected = oracle.decision_function(scaled)
    found = head(x).double().numpy()
    found, expected = (values - values.mean(1, keepdims=True) for values in (found, expected))
    # The head's weights are float32: what cancels in a logit near zero is rounded at the size of the largest ones.
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 + 1e-4 * np.abs(expected).max())


@given(st.integers(0, 500), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_ridge_equals_scikit_learn(seed: int, strength: float):
    x, labels = data(seed)
    (head,) = ridge(sums_of(x, torch.eye(4)[labels]), (strength,))
    z = StandardScaler().fit_transform(x.double().numpy())
    oracle = Ridge(alpha=strength * len(z)).fit(z, np.eye(4)[labels])
    np.testing.assert_allclose(head(x).numpy(), oracle.predict(z), rtol=1e-3, atol=1e-4)


def test_weights_repeat_tokens():
    x, labels = data(0, tokens=40)
    counts = torch.zeros(40, 4)
    counts[torch.arange(40), torch.from_numpy(labels)] = torch.arange(40).remainder(3).float()
    counts[5, 1] += 2
    repeated = [(x[t], c) for t in range(40) for c in range(4) for _ in range(int(counts[t, c]))]
    a = sums_of(x, counts)
    b = sums_of(torch.stack([v for v, _ in repeated]), torch.eye(4)[[c for _, c in repeated]])
    for one, two in ((a.n, b.n), (a.sums, b.sums), (a.xx, b.xx)):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-4)


def test_leaving_a_fold_out_equals_never_having_had_it():
    x, labels = data(1)
    weights = torch.eye(4)[labels]
    whole = sums_of(x, weights)
    left = whole - sums_of(x[:100], weights[:100])
    alone = sums_of(x[100:], weights[100:])
    for a, b in zip(lda(left, (0.1, 0.5), prior=False), lda(alone, (0.1, 0.5), prior=False)):
        torch.testing.assert_close(a(x), b(x), rtol=1e-3, atol=1e-3)


def test_a_class_only_in_the_left_out_fold_is_never_predicted():
    x, labels = data(2)
    weights = torch.eye(4)[labels] * 0.1
    mine = torch.from_numpy(labels) == 3
    whole = sums_of(x, weights)
    left = whole - sums_of(x[mine], weights[mine])
    for head in (*lda(left, (0.1,), prior=True), *ridge(left, (0.1,))):
        assert head.bias[3] == np.float32(NEVER)
        assert torch.isfinite(head(x)).all()
        assert not (head(x).argmax(1) == 3).any()


def test_constant_features_and_large_means_do_no_harm():
    x, labels = data(3)
    weights = torch.eye(4)[labels]
    plain = lda(sums_of(x, weights), (0.1,), prior=False)[0](x)
    shifted = torch.cat([x + 300, torch.full((300, 1), 7.0)], dim=1)
    moved = lda(sums_of(shifted, weights), (0.1,), prior=False)[0](shifted)
    assert (moved.argmax(1) == plain.argmax(1)).float().mean() > 0.99


def test_refuses_nonsense():
    sums = GramSums.zeros(2, 3)
    with pytest.raises(ValueError, match="no labelled"):
        lda(sums, (0.1,), prior=False)
    with pytest.raises(ValueError, match="no labelled"):
        ridge(sums, (0.1,))
    with pytest.raises(ValueError, match="shrinkages"):
        lda(sums, (0.0,), prior=False)
    with pytest.raises(ValueError, match="strengths"):
        ridge(sums, (0.0,))
