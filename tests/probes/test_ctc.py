"""CTC heads and decoders against enumeration and torch's loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from rice_eval.probes.ctc import CtcGroup, beam_search, best_path, needed_steps, split_steps
from rice_eval.probes.linear import Moments


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(c for c, _ in itertools.groupby(path) if c)


def labelling_probability(log_p: torch.Tensor, labels: tuple[int, ...]) -> float:
    """p of a labelling by torch's own loss."""
    loss = F.ctc_loss(
        log_p[:, None], torch.tensor([labels], dtype=torch.long), torch.tensor([len(log_p)]),
        torch.tensor([len(labels)]), reduction="sum",
    )  # fmt: skip
    return float(torch.exp(-loss))


@pytest.mark.parametrize("seed", range(12))
def test_decoders_equal_enumeration_of_all_paths(seed: int):
    torch.manual_seed(seed)
    steps, classes = 5, 4
    logits = torch.randn(steps, classes) * 1.5
    log_p = torch.log_softmax(logits.double(), dim=-1)
    paths = {
        path: float(sum(log_p[t, c] for t, c in enumerate(path)))
        for path in itertools.product(range(classes), repeat=steps)
    }
    assert tuple(best_path(logits)) == collapse(max(paths, key=paths.__getitem__))
    sums: dict[tuple[int, ...], float] = {}
    for path, p in paths.items():
        sums[collapse(path)] = sums.get(collapse(path), 0.0) + float(torch.tensor(p).exp())
    found = tuple(beam_search(logits, width=1000, reach=classes))
    assert found == max(sums, key=sums.__getitem__)
    assert sums[found] == pytest.approx(labelling_probability(log_p, found), rel=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_best_path_is_the_best_alignment_of_its_own_labelling(seed: int):
    """Viterbi over torch's CTC states, forced to the decoded labels, finds no better path than the greedy one."""
    torch.manual_seed(seed)
    log_p = torch.log_softmax(torch.randn(40, 20), dim=-1)
    labels = best_path(log_p)
    states = [0]
    for c in labels:
        states += [c, 0]
    score = torch.full((len(states),), float("-inf"))
    score[0] = log_p[0, 0]
    score[1] = log_p[0, states[1]]
    for t in range(1, len(log_p)):
        before = score.clone()
        for s in range(len(states)):
            options = [before[s]] + ([before[s - 1]] if s else [])
            if s > 1 and states[s] and states[s] != states[s - 2]:
                options.append(before[s - 2])
            score[s] = max(options) + log_p[t, states[s]]
    forced = max(score[-1], score[-2])
    assert float(forced) == pytest.approx(float(log_p.max(dim=-1).values.sum()), rel=1e-5)


def test_steps_of_tokens_stay_in_order():
    logits = torch.arange(12.0).view(2, 6)
    assert split_steps(logits, 3).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert needed_steps([1, 1, 2, 2, 2]) == 8
    assert needed_steps([]) == 0


def _lines(seed: int, n: int, dim: int = 24, chars: int = 5) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Lines whose characters each leave a direction of their own in one or two tokens, with noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(chars + 1, dim, generator=torch.Generator().manual_seed(99))
    features, targets = [], []
    for _ in range(n):
        target = torch.randint(1, chars + 1, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator)
        tokens = [directions[c] + 0.05 * torch.randn(dim, generator=generator) for c in target for _ in range(2)]
        features.append(torch.stack(tokens))
        targets.append(target.tolist())
    return features, targets


def test_group_learns_and_exports():
    features, targets = _lines(0, 64)
    moments = Moments(24)
    for f in features:
        moments.add(f)
    group = CtcGroup(moments, 6, 1, (1e-5, 3e-2), (0.0, 0.0), (0.9, 0.999), 1e-6, torch.device("cpu"))
    first = group.step(features, targets, 1.0)
    for _ in range(150):
        loss = group.step(features, targets, 1.0)
    assert loss[1] < 0.2 * first[1]
    assert loss[0] > loss[1]
    tests, truths = _lines(1, 30)
    head = group.export(1)
    right = sum(best_path(split_steps(head(f), 1)) == t for f, t in zip(tests, truths))
    # Equal neighbours need a blank between them, which two equal tokens in a row can't show: those alone may fail.
    plain = sum(all(a != b for a, b in itertools.pairwise(t)) for t in truths)
    assert right >= plain - 1
    assert torch.allclose(group.logits(tests[0])[1], split_steps(head(tests[0]), 1), atol=1e-3)


def test_heads_side_by_side_equal_heads_alone():
    features, targets = _lines(2, 8)
    moments = Moments(24)
    for f in features:
        moments.add(f)

    def trained(rates: tuple[float, ...], decays: tuple[float, ...]) -> CtcGroup:
        group = CtcGroup(moments, 6, 2, rates, decays, (0.9, 0.999), 1e-6, torch.device("cpu"))
        for k in range(5):
            group.step(features[k : k + 3], targets[k : k + 3], 1.0 - k / 10)
        return group

    both = trained((1e-2, 1e-1), (0.0, 0.1))
    for k, alone in enumerate((trained((1e-2,), (0.0,)), trained((1e-1,), (0.1,)))):
        assert torch.allclose(both.export(k).weight, alone.export(0).weight, atol=1e-5)


def test_lines_too_short_for_their_text_change_nothing():
    moments = Moments(4)
    moments.add(torch.randn(10, 4))
    group = CtcGroup(moments, 3, 1, (1e-2,), (0.0,), (0.9, 0.999), 1e-6, torch.device("cpu"))
    loss = group.step([torch.randn(2, 4)], [[1, 2, 1, 2]], 1.0)
    assert float(loss[0]) == 0
    assert not group.weight.any()


def test_a_batch_whose_every_target_is_empty_trains():
    """As where a charset of digits meets a batch of words: all steps learn to be blank."""
    moments = Moments(4)
    moments.add(torch.randn(20, 4))
    group = CtcGroup(moments, 5, 2, (0.1, 0.01), (0.0, 0.0), (0.9, 0.999), 1e-6, torch.device("cpu"))
    lines = [torch.randn(3, 4), torch.randn(5, 4)]
    first = group.step(lines, [[], []], 1.0)
    assert torch.isfinite(first).all()
    assert (group.step(lines, [[], []], 1.0) < first).all()
