"""Exact nearest neighbours in pieces, and what their labels vote for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Metric", "attend", "nearest", "vote"]

Metric = Literal["cosine", "l2", "dot"]
Rows = Callable[[], Iterable[tuple[int, Tensor]]]
"""Gives rows in pieces, ``(first row, (M, D))``, anew at every call."""

QUERIES_AT_ONCE = 1024
"""Queries compared with one piece of the keys at a time."""


def nearest(
    queries: Rows, keys: Rows, count: int, k: int, metric: Metric, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of each query, exactly; nothing larger than a piece is held besides the result.

    Args:
        queries: rows of queries.
        keys: rows of keys.
        count: how many queries there are.
        k: neighbours; fewer where there are fewer keys.
        metric: ``cosine`` and ``dot`` rank by similarity, ``l2`` by distance.
        device: where distances are computed.

    Returns:
        ``(count, k)`` similarities, best first (for ``l2`` minus the squared distance), and ``(count, k)`` int64 rows of keys.
    """
    best = torch.full((count, k), -torch.inf)
    rows = torch.full((count, k), -1, dtype=torch.int64)
    for first_key, piece in keys():
        prepared = piece.to(device, torch.float32)
        if metric == "cosine":
            prepared = F.normalize(prepared, dim=1)
        squares = prepared.square().sum(dim=1) if metric == "l2" else None
        for first_query, block in queries():
            for start in range(0, len(block), QUERIES_AT_ONCE):
                part = block[start : start + QUERIES_AT_ONCE].to(device, torch.float32)
                if metric == "cosine":
                    part = F.normalize(part, dim=1)
                similarity = part @ prepared.T
                if squares is not None:
                    similarity = 2 * similarity - squares - part.square().sum(dim=1, keepdim=True)
                values, found = similarity.topk(min(k, similarity.shape[1]), dim=1)
                place = slice(first_query + start, first_query + start + len(part))
                merged = torch.cat([best[place], values.cpu()], dim=1)
                where = torch.cat([rows[place], found.cpu() + first_key], dim=1)
                best[place], order = merged.topk(k, dim=1)
                rows[place] = where.gather(1, order)
    kept = int((rows >= 0).sum(dim=1).min()) if count else k
    return best[:, :kept], rows[:, :kept]


def vote(labels: Tensor, ks: Iterable[int], classes: int, ignore: int) -> dict[int, Tensor]:
    """The most frequent label of the first k neighbours, for each k.

    Args:
        labels: ``(N, K, P)`` int64 labels of each neighbour's P pixels, nearest first.
        ks: how many neighbours vote.
        classes: C.
        ignore: a label that has no vote.

    Returns:
        k -> ``(N, P)`` classes; of equally frequent ones the lowest, class 0 where nobody votes.
    """
    n, total, pixels = labels.shape
    cell = (torch.arange(n)[:, None] * pixels + torch.arange(pixels)[None, :]) * classes
    counts = torch.zeros(n * pixels * classes, dtype=torch.int32)
    out, done = {}, 0
    for k in sorted(min(k, total) for k in ks):
        for rank in range(done, k):
            votes = labels[:, rank]
            has = votes != ignore
            # One neighbour votes once a pixel: no index occurs twice.
            counts[(cell + votes.clamp(min=0))[has]] += 1
        done = k
        out[k] = counts.view(n, pixels, classes).argmax(dim=2)
    return {k: out[min(k, total)] for k in ks}


def attend(similarity: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Soft labels of neighbours, weighted by a softmax of their similarities (Balazevic et al., arXiv 2306.01667).

    Args:
        similarity: ``(N, K)`` cosines.
        labels: ``(N, K, C)`` label shares.
        temperature: beta of the paper.

    Returns:
        ``(N, C)``.
    """
    weights = torch.softmax(similarity / temperature, dim=1)
    return torch.einsum("nk,nkc->nc", weights, labels)
