"""Every task card names a reader and options that the reader takes."""

from __future__ import annotations

import pytest

from rice_eval.cards import catalogue
from rice_eval.datasets import load_dataset
from rice_eval.errors import DataError, UsageError
from rice_eval.views import View

CARDS = catalogue().tasks
EMBEDDED = {"scenes", "scenes-text", "scenes-vqa"}
# Two cards leave an option to the user: which annotation files, which of the hundred sets.
NEEDS = {
    "lmms-eval": "read and scored by lmms-eval",
    "coco-format": "_json|needs files of yours",
    "roboflow100": "set|needs files of yours",
}


@pytest.mark.parametrize("name", sorted(CARDS))
def test_card(name: str) -> None:
    card = CARDS[name]
    assert str(View.parse(card.view))
    assert card.license
    for split in (card.train, card.test):
        if card.dataset in EMBEDDED:
            assert len(load_dataset(card.dataset, split, None, card.options)) > 0
        else:
            # Options and splits are checked before files: what is missing are the files alone.
            with pytest.raises((DataError, UsageError), match=NEEDS.get(card.dataset, "needs files of yours")):
                load_dataset(card.dataset, split, None, card.options)
