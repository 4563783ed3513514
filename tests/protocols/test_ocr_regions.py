"""Region labels against scikit-learn, pooling by hand, and the protocols end to end on small pages."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from test_ocr import Lines, Strokes, context_of

from rice_eval.datasets.base import TextLine
from rice_eval.datasets.scenes_text_set import ScenesText
from rice_eval.errors import DataError, PlanError
from rice_eval.metrics.multilabel import MultilabelStatistics, average_precisions
from rice_eval.metrics.statistics import statistics_from_arrays
from rice_eval.protocols.ocr_regions import RegionTokens, ZeroShotWords, pieces_of, region_mean
from rice_eval.protocols.segmentation import held_out
from rice_eval.views import View


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 40))
def test_average_precision_equals_sklearn(seed: int, n: int):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, n).astype(float)  # many ties
    positive = rng.random(n) < 0.4
    positive[rng.integers(n)] = True
    weights = rng.integers(0, 3, (3, n)).astype(float)
    weights[:, positive.argmax()] += 1
    found = average_precisions(scores, positive, weights)
    wanted = [average_precision_score(positive, scores, sample_weight=w) for w in weights]
    assert np.allclose(found, wanted)


def test_statistics_by_hand_and_storage():
    scores = np.array([[3, 2, 1], [1, 2, 3], [1, 3, 2]], np.float32)
    labels = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 1]], bool)
    made = MultilabelStatistics(["a", "b"], np.array([0, 0, 1]), scores, labels, ["x", "y", "z"])
    assert made.point()["map"] == pytest.approx(100)
    assert made.point()["recall_at_5"] == pytest.approx(100)
    again = statistics_from_arrays("multilabel", made.arrays())
    assert again.point() == made.point()
    # Without image b, y never occurs and does not count.
    assert made.values(np.array([[1.0, 0.0]]))["map"][0] == pytest.approx(100)


def test_region_mean_weighs_by_area():
    patches = torch.arange(4.0)[:, None]
    (frame,) = View.parse("square=16").frames(32, 32)
    assert region_mean(patches, (2, 2), frame, np.array([0.0, 0, 32, 32])) == pytest.approx(1.5)
    assert region_mean(patches, (2, 2), frame, np.array([0.0, 0, 24, 16])) == pytest.approx(1 / 3)
    assert region_mean(patches, (2, 2), frame, np.array([40.0, 0, 50, 16])) is None


def test_pieces_are_runs_within_words():
    assert pieces_of("Ab c!", (1,)) == {"a", "b", "c"}
    assert pieces_of("Ab c!", (1, 2)) == {"a", "b", "c", "ab"}


def test_region_tokens_end_to_end():
    train, test = (Lines(ScenesText(split, 12, size=256), range(12)) for split in ("train", "val"))
    protocol = RegionTokens(view="square=256", ridges=(0.1, 1.0))
    found = protocol.run(context_of(protocol, train, test))
    point = found.statistics.point()
    assert set(point) == {"map", "recall_at_5", "recall_at_10"}
    assert all(0 <= v <= 100 for v in point.values())
    assert len(found.heads) == 2
    pieces = dataclasses.replace(protocol, labels="pieces", pieces=20)
    assert len(pieces.run(context_of(pieces, train, test)).statistics.classes) == 20


class Speller(Strokes):
    """Embeds an image by its mean colour and a word by one that only "right" words share."""

    def embed_text(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.tensor([[1.0 + len(t), 1.0, 0.5] for t in texts]), dim=-1)

    def embed_image(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)), dim=-1)


def test_zero_shot_words_need_a_text_tower():
    data = Lines(ScenesText("val", 4, size=256), range(4))
    protocol = ZeroShotWords(candidates=4)
    context = context_of(protocol, data, data)
    with pytest.raises(PlanError, match="text"):
        protocol.run(context)
    context.encoder = Speller
    found = protocol.run(context)
    assert set(found.statistics.point()) == {"accuracy", "recall_at_5"}
    assert found.statistics.point()["recall_at_5"] == 100  # four candidates


def test_lines_that_are_left_out_are_counted():
    extra = [
        TextLine(np.array([[1.0, 1], [40, 1], [40, 20], [1, 20]]), text, ignore)
        for text, ignore in (("?!", False), ("x", True))
    ]
    train = Lines(ScenesText("train", 3, size=256), range(3), extra)
    protocol = RegionTokens(view="square=256", ridges=(0.1,))
    found = protocol.run(context_of(protocol, train, train))
    for what in ("train", "test"):
        assert f"{what}: 6 lines are don't-care or have no letter or digit; they are no regions" in found.warnings
    words = ZeroShotWords(candidates=4)
    context = context_of(words, train, train)
    context.encoder = Speller
    notes = "\n".join(words.run(context).warnings)
    assert "test: 3 lines are don't-care or have an empty label" in notes
    assert re.search(r"test: 3 of \d+ lines have no letter or digit and are not ranked", notes)


def test_no_label_among_the_held_out_images_is_one_sentence():
    data = ScenesText("train", 3, size=256)
    lines = [TextLine(np.array([[1.0, 1], [40, 1], [40, 20], [1, 20]]), text) for text in "aab"]

    class OneLine(Lines):
        def text(self, index: int) -> tuple[TextLine, ...]:
            return (lines[index],)

    train = OneLine(data, range(3))
    for seed in range(4):
        protocol = RegionTokens(view="square=256", ridges=(0.1,), pieces=1, seed=seed)
        (away,) = held_out(range(3), 0.2, seed)[1]
        if lines[away].text == "b":
            with pytest.raises(DataError, match="the held-out training images have none of the 1 labels"):
                protocol.run(context_of(protocol, train, train))
            return
    raise AssertionError("no seed holds out the image of b")
