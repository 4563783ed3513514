"""Shares of the training labels: the rule, the bank they share, what they say."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from segmentation_fakes import FakeDataset, context_of

from rice_eval.errors import UsageError
from rice_eval.protocols.base import configure
from rice_eval.protocols.gram import GramLDA
from rice_eval.protocols.labels import labelled_images
from rice_eval.protocols.linear import Linear

IDS = [f"{k:012d}" for k in range(640)]


def test_the_rule_is_the_documented_one():
    ranked = sorted(range(len(IDS)), key=lambda i: hashlib.sha256(f"3:{IDS[i]}".encode()).hexdigest())
    assert labelled_images(IDS, "1/64", 3) == tuple(sorted(ranked[:10]))
    # A list fixed for ever: another machine, another version of Python or numpy picks the same images.
    assert labelled_images(IDS, "1/128", 0) == (28, 51, 474, 476, 585)
    assert labelled_images(IDS, "all", 5) == tuple(range(640))
    assert len(labelled_images(IDS[:20], "1/128", 0)) == 2


@given(st.integers(2, 200), st.integers(0, 5), st.sampled_from(["1/128", "1/64", "1/8", "0.5"]))
def test_splits_are_nested_and_follow_the_ids_alone(count: int, seed: int, labels: str):
    ids = IDS[:count]
    small, large = set(labelled_images(ids, labels, seed)), set(labelled_images(ids, "3/4", seed))
    assert small <= large | small
    assert len(small) <= len(large)
    if len(small) < len(large):
        assert small < large
    turned = ids[::-1]
    assert {turned[i] for i in labelled_images(turned, labels, seed)} == {ids[i] for i in small}


class Blind(FakeDataset):
    """Masks of images outside the share must not be opened."""

    def __init__(self, *arguments, allowed=None, **more):
        super().__init__(*arguments, **more)
        self.allowed = allowed

    def semantic(self, index: int):
        assert self.allowed is None or index in self.allowed
        return super().semantic(index)


@pytest.mark.parametrize(
    "protocol",
    [
        Linear(view="square=28", lrs=(1e-2, 3e-2), wds=(0.0,), steps=30, batch=4, labels="1/4", seed=1),
        GramLDA(view="square=28", labels="1/4", seed=1, folds=2),
    ],
)
def test_a_share_equals_a_training_set_of_those_images(protocol):
    train, test = Blind("train", 16, 0), FakeDataset("test", 4, 1)
    picked = labelled_images([train.image_id(i) for i in range(16)], "1/4", 1)
    train.allowed = set(picked)
    outcome = protocol.run(context_of(protocol, train, test))
    assert "4 of 16 images: labels 1/4, split 1" in outcome.warnings[0]
    alone = FakeDataset("train", 16, 0)
    alone._items = [alone._items[i] for i in picked]
    whole = configure(type(protocol), {**protocol.settings(), "labels": "all"})
    other = whole.run(context_of(whole, alone, test))
    np.testing.assert_array_equal(outcome.statistics.areas, other.statistics.areas)
    assert [h.score for h in outcome.heads] == [h.score for h in other.heads]


def test_the_hash_of_a_whole_run_does_not_know_of_shares():
    assert "labels" not in Linear(view="square=28").settings()
    assert Linear(view="square=28").hash == "75f331f70a4fbc96"
    assert Linear(view="square=28", labels="1/8").hash != Linear(view="square=28", labels="1/64").hash


@pytest.mark.parametrize("labels", ["0", "1", "2", "-1/2", "half", "1/0"])
def test_what_is_no_share_is_refused(labels: str):
    for kind in (Linear, GramLDA):
        with pytest.raises(UsageError, match="labels"):
            configure(kind, {"view": "square=28", "labels": labels})
