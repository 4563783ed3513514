"""Alignment: cells know which words they lie on, whatever the view."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rice_eval.datasets.base import Dataset, Question
from rice_eval.datasets.scenes_vqa import ScenesVqa
from rice_eval.errors import DataError
from rice_eval.mllm.align import Region, align, coverage, regions_of, words_of
from rice_eval.mllm.lm import tiny_random
from rice_eval.mllm.probe import PooledProjector
from rice_eval.mllm.vqa import asked, dialogues
from rice_eval.views import View


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.floats(0, 1)] * 4), st.integers(1, 9))
def test_coverage_is_the_share_of_fine_pixels(corners, side):
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    fine = 64
    centres = (np.arange(side * fine) + 0.5) / (side * fine)
    inside = ((centres > y0) & (centres < y1))[:, None] & ((centres > x0) & (centres < x1))[None]
    direct = inside.reshape(side, fine, side, fine).mean((1, 3)).reshape(-1)
    np.testing.assert_allclose(coverage((x0, y0, x1, y1), side).numpy(), direct, atol=3 / fine)


class _One(Dataset):
    name, split = "one", "train"

    def __len__(self):
        return 1

    def questions(self, index):
        return (
            Question("region", "", "Red sea-bird", (0.0, 0.0, 50.0, 100.0)),
            Question("region", "", "Blue car", (150.0, 0.0, 200.0, 100.0)),
            Question("presence", "Is there a car?", "Yes"),
        )


def test_regions_follow_the_view():
    whole, _ = regions_of(_One().questions(0)[:2], View.parse("square=56").frames(100, 200)[0])
    assert whole.box == pytest.approx((0, 0, 0.25, 1), abs=1e-6)
    assert whole.words == ("red", "sea", "bird")
    # The last of two windows shows the right half of the image: one region is outside, the other at its right edge.
    *_, last = View.parse("native,crop=98,slide=98").frames(100, 200)
    (shown,) = regions_of(_One().questions(0)[:2], last)
    assert shown.words == ("blue", "car")


def test_words_lie_where_the_language_model_has_them():
    lm = tiny_random()
    regions = [[Region((0, 0, 1, 1), ("red", "car"))] for _ in range(10)] + [[Region((0, 0, 1, 1), ("rare",))]]
    words = words_of(regions, lm)
    assert words.names == ("car", "red")
    table = lm.model.get_input_embeddings().weight
    torch.testing.assert_close(words.embeddings[0], table[lm.tokenizer("car").input_ids].mean(0))
    with pytest.raises(DataError, match="no two words"):
        words_of(regions[:3], lm)


def test_embeddings_come_near_the_words_of_what_they_lie_on():
    lm, side, generator = tiny_random(), 3, torch.Generator().manual_seed(0)
    names = ("red", "car", "bird")
    signs = torch.randn(3, 12, generator=generator)
    tokens, regions = [], []
    for _ in range(96):
        cells = torch.randint(0, 9, (2,), generator=generator).tolist()
        kinds = torch.randint(0, 3, (2,), generator=generator).tolist()
        image = 0.1 * torch.randn(9, 12, generator=generator)
        boxes = {}
        for cell, kind in zip(cells, kinds):
            if cell not in boxes:
                image[cell] += signs[kind]
                row, col = divmod(cell, 3)
                boxes[cell] = Region((col / 3, row / 3, (col + 1) / 3, (row + 1) / 3), (names[kind],))
        tokens.append(image)
        regions.append(list(boxes.values()))
    words = words_of(regions, lm)

    def trained():
        projector = PooledProjector(12, lm.width, side, 32, 2, 0)
        projector.start(tokens, lm.word_size(), lm.words([0]))
        return projector, align(projector, tokens, regions, words, epochs=30, lr=3e-3, seed=0)

    projector, losses = trained()
    assert losses[-1] < 0.3 * losses[0]
    shown = torch.stack([signs[k].expand(9, 12) for k in range(3)])
    out = projector.words(shown, (side, side))[:, 0] * projector.size
    torch.testing.assert_close(projector(shown, (side, side))[:, 0], out)  # the reading layer begins as the identity
    middle = words.embeddings.mean(0)
    near = torch.nn.functional.cosine_similarity((out - middle)[:, None], (words.embeddings - middle)[None], dim=-1)
    assert [words.names[int(k)] for k in near.argmax(-1)] == list(names)
    again, _ = trained()
    assert all(torch.equal(a, b) for a, b in zip(projector.state_dict().values(), again.state_dict().values()))


def test_scenes_describe_their_boxes_in_train_alone():
    train, val = ScenesVqa("train", 2), ScenesVqa("val", 2)
    frame = View.parse("square=224").frames(*train.size(0))[0]
    regions = regions_of(dialogues(train)[0].regions, frame)
    assert len(regions) == len(train.scene(0).objects)
    assert not any(q.kind == "region" for q in val.questions(0))
    told = {q.kind for d in dialogues(train) for q in (*d.questions, *d.captions)}
    assert "region" not in told | {q.kind for q in asked(val)}
