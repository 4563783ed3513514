"""Neighbours against a full sort and against FAISS; votes against counting by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from rice_eval.probes import knn
from rice_eval.probes.knn import attend, nearest, vote
from rice_eval.probes.lbfgs import minimise

CPU = torch.device("cpu")


def pieces(rows: torch.Tensor, size: int):
    return lambda: [(start, rows[start : start + size]) for start in range(0, len(rows), size)]


def data(seed: int, queries: int = 37, keys: int = 90, dim: int = 6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(queries, dim, generator=generator), torch.randn(keys, dim, generator=generator)


@given(st.integers(0, 999), st.sampled_from(["cosine", "l2", "dot"]), st.integers(1, 12), st.integers(5, 100))
def test_equals_sorting_everything(seed, metric, k, size):
    queries, keys = data(seed)
    values, rows = nearest(pieces(queries, 10), pieces(keys, size), len(queries), k, metric, CPU)
    if metric == "l2":
        full = -torch.cdist(queries.double(), keys.double()).square()
    else:
        a, b = (
            (queries, keys) if metric == "dot" else (torch.nn.functional.normalize(v, dim=1) for v in (queries, keys))
        )
        full = a.double() @ b.double().T
    expected, order = full.sort(dim=1, descending=True)
    torch.testing.assert_close(values.double(), expected[:, :k], atol=1e-4, rtol=1e-4)
    assert torch.equal(rows, order[:, :k])


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_equals_faiss(metric, monkeypatch):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (pip install faiss-cpu)")
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 7)
    queries, keys = data(5, 200, 1000, 16)
    index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(16)
    index.add(keys.numpy())
    _, expected = index.search(queries.numpy(), 30)
    rows = nearest(pieces(queries, 64), pieces(keys, 300), 200, 30, metric, CPU)[1]
    assert np.array_equal(rows.numpy(), expected)


def test_fewer_keys_than_neighbours():
    queries, keys = data(0, keys=4)
    values, rows = nearest(pieces(queries, 9), pieces(keys, 3), len(queries), 30, "cosine", CPU)
    assert values.shape == rows.shape == (37, 4)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(4).expand(37, 4))


@given(st.integers(0, 999))
def test_votes_equal_counting(seed):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(-1, 4, (5, 9, 3)))
    found = vote(labels, (1, 3, 9, 30), 4, ignore=-1)
    for k in (1, 3, 9, 30):
        for n in range(5):
            for p in range(3):
                counts = Counter(int(v) for v in labels[n, :k, p] if v != -1)
                best = min(counts, key=lambda c: (-counts[c], c)) if counts else 0
                assert found[k][n, p] == best


def test_attention_is_a_weighted_mean():
    similarity = torch.tensor([[0.9, 0.9, -1.0]])
    labels = torch.eye(3)[None]
    torch.testing.assert_close(attend(similarity, labels, 0.02), torch.tensor([[0.5, 0.5, 0.0]]))


def test_lbfgs_on_many_problems_equals_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    x = rng.normal(size=(200, 5)) + rng.normal(size=(3, 5))[y]
    cs = (1e-3, 0.1, 10.0)
    tx, truth = torch.from_numpy(x), torch.eye(3, dtype=torch.float64)[y]

    def objective(points, problems):
        values, gradients = [], []
        for point, problem in zip(points, problems.tolist()):
            leaf = point.clone().requires_grad_()
            table = leaf.view(6, 3)
            loss = -(torch.log_softmax(tx @ table[:-1] + table[-1], dim=1) * truth).sum() / 200
            loss = loss + table[:-1].square().sum() / (2 * cs[problem] * 200)
            gradients.append(torch.autograd.grad(loss, leaf)[0])
            values.append(loss.detach())
        return torch.stack(values), torch.stack(gradients)

    start = torch.zeros(3, 18, dtype=torch.float64)
    end = minimise(objective, start, steps=500, tolerance=1e-9, memory=5, trials=50, tell=lambda n: None)
    assert end.converged.all()
    for c, point in zip(cs, end.points):
        oracle = LogisticRegression(C=c, max_iter=10_000, tol=1e-10).fit(x, y)
        np.testing.assert_allclose(point.view(6, 3)[:-1].T.numpy(), oracle.coef_, atol=1e-4)
    short = minimise(objective, start, steps=2, tolerance=1e-9, memory=5, trials=50, tell=lambda n: None)
    assert not short.converged.any()
    assert (short.steps == 2).all()


def test_a_step_that_goes_too_far_is_halved():
    def steep(points, problems):
        return (5e3 * points.square()).sum(dim=1), 1e4 * points

    start = torch.full((2, 1), 0.1, dtype=torch.float64)
    end = minimise(steep, start, steps=50, tolerance=1e-9, memory=5, trials=50, tell=lambda n: None)
    assert end.points.abs().max() < 1e-9
    stuck = minimise(steep, start, steps=50, tolerance=1e-9, memory=5, trials=1, tell=lambda n: None)
    assert torch.equal(stuck.points, start)
    assert stuck.converged.all()
