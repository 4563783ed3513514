"""Protocols ``linear``, ``gram-lda`` and ``gram-ridge`` on small in-memory sources."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from segmentation_fakes import FakeDataset, FakeEncoder, context_of
from torch.nn import functional as F

from rice_eval.datasets.base import IGNORE
from rice_eval.errors import DataError, PlanError, UsageError
from rice_eval.metrics.iou import IoUStatistics
from rice_eval.protocols.base import Protocol, configure
from rice_eval.protocols.gram import GramLDA, GramRidge
from rice_eval.protocols.linear import Linear
from rice_eval.protocols.segmentation import held_out, label_map, layers_of, predict, scaled_logits
from rice_eval.views import View

SMALL = {"steps": 40, "batch": 4, "lrs": (1e-2, 3e-2), "wds": (0.0,)}


def train_and_test(count: int = 12):
    return FakeDataset("train", count, 0, sizes=((28, 42), (35, 21))), FakeDataset("test", 5, 1, sizes=((31, 44),))


def protocols(view: str) -> list[Protocol]:
    return [
        Linear(view=view, layer_set="all", **SMALL),
        GramLDA(view=view, layer_set="all"),
        GramRidge(view=view, layer_set="all"),
    ]


@pytest.mark.parametrize("view", ["square=28", "native,slide=7,crop=14,pad=14", "short=28,pad=14", "letterbox=28,flip"])
@pytest.mark.parametrize("pyramid", [False, True])
def test_learns_on_every_kind_of_view(view: str, pyramid: bool):
    train, test = train_and_test()
    for protocol in protocols(view):
        context = context_of(protocol, train, test, FakeEncoder(pyramid), panels=2, keep_predictions=True)
        outcome = protocol.run(context)
        assert isinstance(outcome.statistics, IoUStatistics)
        assert outcome.statistics.point()["miou"] > 35  # chance is about 12
        assert outcome.chosen["layer"] in (1, 2)
        assert len(outcome.heads) == 2 * (2 if protocol.id == "linear" else 6)
        assert outcome.predictions is not None
        assert [p.index for p in outcome.panels] == [0, 4]
        for index in range(len(test)):
            prediction = outcome.predictions[test.image_id(index)]
            assert prediction.shape == test.size(index)
            assert prediction.dtype == np.int16


def test_two_runs_agree_to_the_bit_and_the_seed_counts():
    train, test = train_and_test()
    for protocol in protocols("square=28"):
        first, second = (protocol.run(context_of(protocol, train, test)) for _ in range(2))
        assert first.chosen == second.chosen
        assert first.heads == second.heads
        np.testing.assert_array_equal(first.statistics.areas, second.statistics.areas)
        other = dataclasses.replace(protocol, seed=7)
        assert other.hash != protocol.hash
        assert other.run(context_of(protocol, train, test)).heads != first.heads


CHANGES = {
    Linear: {
        "view": "square=42", "norm": False, "seed": 3, "layer_set": "last", "lrs": (0.5,), "wds": (30.0,),
        "betas": (0.5, 0.9), "steps": 3, "batch": 1, "tokens_per_image": 2, "warmup": 0.9, "norm_eps": 5.0,
        "holdout": 0.6, "labels": "1/2",
    },
    GramLDA: {
        "view": "square=42", "norm": False, "seed": 3, "layer_set": "last", "shrinkages": (0.9, 1.0), "folds": 3,
        "prior": True, "labels": "1/2",
    },
    GramRidge: {
        "view": "square=42", "norm": False, "seed": 3, "layer_set": "last", "penalties": (3.0, 9.0), "folds": 3,
        "labels": "1/2",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_every_field_is_in_the_hash_and_read(kind: type[Protocol]):
    """``tokens`` (the bank's number format) is read where the bank is built; every other field changes this outcome."""
    train, test = train_and_test()
    base = next(p for p in protocols("square=28") if type(p) is kind)
    assert set(CHANGES[kind]) | {"tokens"} == {f.name for f in dataclasses.fields(kind)}
    before = base.run(context_of(base, train, test))
    for name, value in CHANGES[kind].items():
        changed = dataclasses.replace(base, **{name: value})
        assert changed.hash != base.hash, name
        after = changed.run(context_of(changed, train, test))
        same = after.heads == before.heads and np.array_equal(after.statistics.areas, before.statistics.areas)
        assert not same, name


def test_one_head_needs_no_choice_and_holds_nothing_out():
    train, test = train_and_test(1)
    for protocol in (
        Linear(view="square=28", steps=20, batch=2, lrs=(1e-2,), wds=(0.0,)),
        GramLDA(view="square=28", shrinkages=(0.1,)),
    ):
        outcome = protocol.run(context_of(protocol, train, test))
        assert outcome.heads[0].score is None
    for protocol in protocols("square=28"):
        with pytest.raises(PlanError, match="at least 2"):
            protocol.run(context_of(protocol, train, test))


def test_a_class_absent_from_test_is_said():
    train, test = train_and_test()
    for _, labels in test._items:
        labels[labels == 2] = IGNORE
    protocol = GramLDA(view="square=28")
    outcome = protocol.run(context_of(protocol, train, test))
    assert outcome.warnings == ("1 of 4 classes do not occur in the test split: class 2",)


def test_bad_labels_are_one_line():
    train, test = train_and_test()
    train._items[3][1][0, 0] = 9
    protocol = GramLDA(view="square=28")
    with pytest.raises(DataError, match="train003.*label 9"):
        protocol.run(context_of(protocol, train, test))
    train._items[3] = (train._items[3][0], np.zeros((5, 5), dtype=np.int64))
    with pytest.raises(DataError, match="train003.*differ in size"):
        protocol.run(context_of(protocol, train, test))
    for item in train._items:
        item[1][:] = IGNORE
    train._items[3] = train._items[5]
    for anything in protocols("square=28"):
        with pytest.raises(DataError, match="no training image has a labelled pixel"):
            anything.run(context_of(anything, train, test))


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_set": "first"}, {"steps": 0}, {"lrs": ()}, {"betas": (0.9,)}, {"holdout": 1.0}, {"warmup": 1.5},
        {"lrs": "-1"}, {"lrs": "nan"}, {"wds": "-1"}, {"betas": "1,1"}, {"norm_eps": -1.0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: dict):
    with pytest.raises(UsageError, match="linear"):
        configure(Linear, {"view": "square=28", **settings})


def test_a_head_that_diverged_is_no_score():
    protocol = Linear(view="square=28", lrs=(1e38,), wds=(0.0,), steps=20, batch=2)
    with pytest.raises(PlanError, match="diverged"):
        protocol.run(context_of(protocol, *train_and_test()))


def test_held_out_is_a_partition():
    fit, held = held_out(range(50), 0.1, seed=1)
    assert len(held) == 5
    assert sorted((*fit, *held)) == list(range(50))
    assert held_out(range(50), 0.1, seed=2)[1] != held
    assert len(held_out((3, 8), 0.9, 0)[0]) == 1


def test_layers_by_name():
    facts = dataclasses.replace(FakeEncoder().facts, layers=12)
    assert layers_of("last", facts) == (12,)
    assert layers_of("last4", facts) == (9, 10, 11, 12)
    assert layers_of("quarters", facts) == (3, 6, 9, 12)
    assert layers_of("quarters", dataclasses.replace(facts, layers=3)) == (1, 2, 3)
    assert layers_of("last4", dataclasses.replace(facts, layers=3)) == (1, 2, 3)


def test_label_map_equals_upsampling_everything():
    logits = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(logits[None], size=(33, 41), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(label_map(logits, (33, 41)).long(), expected)
    assert torch.equal(label_map(logits, (5, 6)).long(), logits.argmax(0))


def test_windows_go_back_where_they_came_from():
    """Logits that only depend on the place in the image come back the same from any view."""
    height, width = 40, 60

    def at(frame):  # the x coordinate of each pixel of the frame, in pixels of the scaled image
        x = torch.arange(frame.size[1], dtype=torch.float32) + frame.left
        x = x.flip(0) if frame.flip else x
        return x.expand(2, *frame.size)

    for text in ("native,slide=10,crop=16,pad=7", "native,pad=32,flip", "native,slide=16,crop=16,pad=7,flip"):
        frames = View.parse(text).frames(height, width)
        whole = scaled_logits([at(f) for f in frames], frames)
        torch.testing.assert_close(whole, torch.arange(60.0).expand(2, 40, 60))
        flat = torch.stack([torch.full((40, 60), 29.6), whole[0]])
        expected = flat.argmax(0)
        cut = [torch.stack([torch.full(f.size, 29.6), at(f)[0]]) for f in frames]
        assert np.array_equal(predict(cut, frames), expected.numpy())
