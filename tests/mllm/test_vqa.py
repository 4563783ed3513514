"""``scenes-vqa``: balanced answers, LLaVA's format, the local task of lmms-eval."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rice_eval.datasets import load_dataset
from rice_eval.datasets.scenes_vqa import CAPTION, KINDS, POST_PROMPT, REGION, ScenesVqa
from rice_eval.errors import UsageError
from rice_eval.mllm.lmms_task import write_task
from rice_eval.mllm.score import exact, normalise
from rice_eval.mllm.vqa import asked, dialogues, llava_entries


@pytest.fixture(scope="module")
def val() -> ScenesVqa:
    return ScenesVqa("val", 60, 96)


def test_all_kinds_are_asked_and_captions_never(val: ScenesVqa):
    assert {q.kind for q in asked(val)} == set(KINDS)
    train = ScenesVqa("train", 2, 96)
    assert {CAPTION, REGION} == {q.kind for q in train.questions(0)} - set(KINDS)
    assert CAPTION not in {q.kind for q in asked(train)}


def test_presence_is_half_yes_in_every_scene(val: ScenesVqa):
    asked_about = 0
    for index in range(len(val)):
        said = Counter(q.answer for q in val.questions(index) if q.kind == "presence")
        assert said["Yes"] == said["No"]  # none of either where nothing in the scene is large enough
        asked_about += said["Yes"] > 0
    assert asked_about > 0.8 * len(val)


def test_truth_of_presence_counting_and_colour(val: ScenesVqa):
    from rice_eval.datasets.scenes_questions import CLASS_WORDS

    names = val.things[:-1]
    for index in range(20):
        things = [t for t in val.scene(index).objects if t.text is None]
        there = Counter(names[t.label] for t in things)
        for q in val.questions(index):
            if q.kind == "presence" and q.question == "Is there a sign in the image?":
                assert (q.answer == "Yes") == any(t.text is not None for t in val.scene(index).objects)
            elif q.kind == "presence":
                (name,) = [n for n in names if q.question == f"Is there {CLASS_WORDS[n][0]} in the image?"]
                assert (q.answer == "Yes") == (there[name] > 0)
            elif q.kind == "counting":
                (name,) = [n for n in names if q.question == f"How many {CLASS_WORDS[n][1]} are in the image?"]
                assert int(q.answer) == there[name]
            elif q.kind == "colour":
                words = q.question.removeprefix("What colour is the ").removesuffix("?")
                (thing,) = [t for t in things if CLASS_WORDS[names[t.label]][0].split(" ", 1)[1] == words]
                assert q.answer.lower() == thing.colour


def test_a_guess_from_the_wording_stays_at_chance():
    train, val = ScenesVqa("train", 150, 64), ScenesVqa("val", 150, 64)
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for q in asked(train):
        seen[q.question][q.answer] += 1
    hits: dict[str, list[bool]] = defaultdict(list)
    for q in asked(val):
        guess = seen[q.question].most_common(1)[0][0] if q.question in seen else ""
        hits[q.kind].append(guess == q.answer)
    rate = {kind: sum(h) / len(h) for kind, h in hits.items()}
    assert rate["presence"] < 0.58
    assert rate["colour"] < 0.30
    assert rate["counting"] < 0.47
    assert rate["position"] < 0.58


def test_a_scene_does_not_depend_on_the_number_of_scenes(val: ScenesVqa):
    assert ScenesVqa("val", 5, 96).questions(3) == val.questions(3)
    assert ScenesVqa("val", 5, 96).fingerprint != val.fingerprint


def test_reader_refuses_a_folder(tmp_path: Path):
    with pytest.raises(UsageError, match="made in memory"):
        load_dataset("scenes-vqa", "val", tmp_path, {})


def test_llava_format():
    entries = list(llava_entries(ScenesVqa("train", 2, 96)))
    first = entries[0]["conversations"]
    assert first[0]["value"].startswith("<image>\n")
    assert first[0]["value"].endswith(POST_PROMPT)
    assert [t["from"] for t in first] == ["human", "gpt"] * (len(first) // 2)
    assert first[-2]["value"] == "Describe the image."
    assert json.dumps(entries)


def test_captions_can_be_left_out():
    (told,) = dialogues(ScenesVqa("train", 1, 96), captions=False)
    assert not told.captions
    assert all("Describe" not in t.text for t in told.turns())


def _utils(folder: Path):
    spec = importlib.util.spec_from_file_location("task_utils", folder / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_local_task(tmp_path: Path):
    val = ScenesVqa("val", 3, 64)
    write_task(val, tmp_path / "task", train=ScenesVqa("train", 2, 64))
    task = yaml.load((tmp_path / "task" / "scenes_vqa.yaml").read_text().replace("!function ", ""), yaml.SafeLoader)
    assert task["task"] == "scenes_vqa"
    assert {m["metric"] for m in task["metric_list"]} >= {"accuracy", "accuracy_presence"}
    utils = _utils(tmp_path / "task")
    rows = [json.loads(line) for line in (tmp_path / "task" / "scenes_vqa.jsonl").read_text().splitlines()]
    ours = asked(val)
    assert len(rows) == len(ours)
    for row, q in zip(rows, ours):
        assert utils.doc_to_text(row, task["lmms_eval_specific_kwargs"]["default"]) == q.prompt
        assert utils.process_results(row, [q.answer.upper() + "."])["accuracy"] == 1.0
        assert utils.process_results(row, ["nothing"])[f"accuracy_{q.kind}"] == 0.0
    (image,) = utils.doc_to_visual(rows[0])
    assert isinstance(image, Image.Image)
    assert (val.image(0) == image).all()
    lessons = json.loads((tmp_path / "task" / "train.json").read_text())
    assert (tmp_path / "task" / lessons[0]["image"]).is_file()


@given(st.text(max_size=30))
def test_normalise_is_idempotent(text: str):
    assert normalise(normalise(text)) == normalise(text)
    assert exact(text, text.upper()) or text.upper().lower() != text.lower()


@pytest.mark.parametrize("said", ["Yes", "yes.", " YES ", '"yes"', "yes\n"])
def test_forms_of_an_answer(said: str):
    assert exact(said, "Yes")
    assert not exact(said, "No")
    assert not exact("yes it is", "Yes")
