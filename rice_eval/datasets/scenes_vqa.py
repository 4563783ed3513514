"""``scenes-vqa``: questions with short answers about the embedded scenes, several an image, balanced so that a guess without the
image stays at chance.

Scene ``i`` and its questions depend on (seed, split, i) alone. Sprites, backgrounds, fonts and words of ``val`` never occur in
``train``. See ``docs/mllm.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from rice_eval.datasets.base import Dataset, DatasetOptions, Question, check_options, files_fingerprint
from rice_eval.datasets.scenes import Scenes
from rice_eval.datasets.scenes_facts import MAX_SIZE, MIN_SIZE, fingerprint
from rice_eval.datasets.scenes_layout import GENERATOR
from rice_eval.datasets.scenes_pack import SPLITS, pack
from rice_eval.datasets.scenes_questions import CLASS_WORDS
from rice_eval.datasets.scenes_raster import Draws
from rice_eval.datasets.scenes_render import Object, Scene
from rice_eval.errors import UsageError

__all__ = [
    "CAPTION",
    "KINDS",
    "POST_PROMPT",
    "REGION",
    "VERSION",
    "ScenesVqa",
    "ScenesVqaOptions",
    "ask",
    "describe",
    "factory",
]

KINDS = ("presence", "counting", "colour", "position", "reading", "box")
"""Kinds of questions, in the order they are asked."""

CAPTION = "caption"
"""Kind of what is said to describe a training image; never asked in a test."""

REGION = "region"
"""Kind of what is said of one box of a training image; never asked in a test."""

VERSION = 2
"""Raised with every change of a question or an answer."""

POST_PROMPT = "\nAnswer the question using a single word or phrase."
"""What follows a question that is asked alone: the words of LLaVA-1.5's short-answer data (arXiv 2310.03744, section 3.2)."""

_APART = 0.15  # of the image's side: centres of boxes nearer than this are not asked about
_CLEAR = 0.03  # of the image's area: presence and colour are asked of objects at least this large
_PAIRS = 2  # presence questions an image: this many with yes, this many with no
_COLOURS = 2
_POSITIONS = 2
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")


def _a(label: int) -> str:
    return CLASS_WORDS[pack().classes[label]][0]


def _words(label: int) -> str:
    return CLASS_WORDS[pack().classes[label]][0].split(" ", 1)[1]


def _take(pool: list[Any], count: int, draws: Draws) -> list[Any]:
    order = draws.shuffled(len(pool))
    return [pool[k] for k in order[:count]]


def _clear(thing: Object, side: int) -> bool:
    return thing.area >= _CLEAR * side * side


def _presence(things: list[Object], signs: int, side: int, draws: Draws) -> list[Question]:
    # As many questions with yes as with no in every scene, classes drawn evenly on both sides: the wording tells nothing.
    classes = pack().classes
    there = {thing.label for thing in things}
    yes = [_a(k) for k in sorted({thing.label for thing in things if _clear(thing, side)})]
    no = [_a(k) for k in range(len(classes)) if k not in there]
    count = min(_PAIRS, len(yes), len(no))
    yes, no = _take(yes, count, draws), _take(no, count, draws)
    # 85 of 100 scenes have a sign: so many fewer of them are asked about it, one question in place of another.
    if count and signs == 0:
        no[0] = "a sign"
    elif count and draws.below(85) < 15:
        yes[0] = "a sign"
    asked = [(words, "Yes") for words in yes] + [(words, "No") for words in no]
    return [
        Question("presence", f"Is there {words} in the image?", answer)
        for words, answer in _take(asked, len(asked), draws)
    ]


def _counting(things: list[Object], draws: Draws) -> list[Question]:
    # Scenes repeat one class one to three times, each as often: asking about the most frequent class balances answers.
    counts = Counter(thing.label for thing in things)
    most = max(counts.values())
    pool = sorted(label for label, count in counts.items() if count == most)
    plural = CLASS_WORDS[pack().classes[pool[draws.below(len(pool))]]][1]
    return [Question("counting", f"How many {plural} are in the image?", str(most))]


def _colour(unique: list[Object], side: int, draws: Draws) -> list[Question]:
    pool = [thing for thing in unique if thing.colour is not None and _clear(thing, side)]
    return [
        Question("colour", f"What colour is the {_words(thing.label)}?", str(thing.colour).capitalize())
        for thing in _take(pool, _COLOURS, draws)
    ]


def _position(unique: list[Object], side: int, draws: Draws) -> list[Question]:
    pool = []
    for k, a in enumerate(unique):
        for b in unique[k + 1 :]:
            for axis in (0, 1):
                gap = (a.box[axis] + a.box[axis + 2] - b.box[axis] - b.box[axis + 2]) / 2
                if abs(gap) >= _APART * side:
                    pool.append((a, b, axis, gap < 0))
    out = []
    for a, b, axis, before in _take(pool, _POSITIONS, draws):
        if draws.below(2):
            a, b, before = b, a, not before
        first, second = (("sign" if t.text is not None else _words(t.label)) for t in (a, b))
        if axis == 0:
            text, answer = f"Is the {first} to the left or right of the {second}?", "Left" if before else "Right"
        else:
            text, answer = f"Is the {first} above or below the {second}?", "Above" if before else "Below"
        out.append(Question("position", text, answer))
    return out


def _box(things: list[Object], side: int, draws: Draws) -> list[Question]:
    thing = things[draws.below(len(things))]
    x0, y0, x1, y1 = (float(v) for v in thing.box)
    where = ", ".join(str(round(100 * v / side)) for v in (x0, y0, x1, y1))
    name = pack().classes[thing.label].capitalize()
    return [Question("box", f"What kind of thing is in the box [{where}]?", name, (x0, y0, x1, y1))]


def ask(scene: Scene, seed: int, split: str, index: int) -> tuple[Question, ...]:
    """All questions about one scene, in the order of ``KINDS``; a kind that the scene has no clear case of is left out.

    Boxes in the wording are percent of the image's side (x0, y0, x1, y1); ``Question.box`` is in pixels.
    """
    draws = Draws(seed, SPLITS.index(split), index, 5)
    side = int(scene.image.shape[0])
    things = [thing for thing in scene.objects if thing.text is None]
    signs = [thing for thing in scene.objects if thing.text is not None]
    counts = Counter(thing.label for thing in things)
    unique = [thing for thing in things if counts[thing.label] == 1]
    out = _presence(things, len(signs), side, draws) + _counting(things, draws) + _colour(unique, side, draws)
    out += _position([*unique, *signs] if len(signs) == 1 else unique, side, draws)
    if len(signs) == 1 and signs[0].legible:
        out.append(Question("reading", "What does the sign say?", str(signs[0].text)))
    return (*out, *_box(things, side, draws))


def _regions(scene: Scene) -> list[Question]:
    """Every object with its box, its named colour and its class: what RefCOCO or Visual Genome say of theirs."""
    out = []
    for thing in scene.objects:
        noun = "sign" if thing.text is not None else _words(thing.label)
        words = f"{thing.colour} {noun}" if thing.colour is not None else noun
        x0, y0, x1, y1 = (float(v) for v in thing.box)
        out.append(Question(REGION, "Describe this part of the image.", words.capitalize(), (x0, y0, x1, y1)))
    return out


def describe(scene: Scene) -> str:
    """A sentence that names what is in a scene, with numbers and named colours: a caption to learn from."""
    groups: dict[tuple[str | None, int], int] = Counter()
    for thing in sorted(scene.objects, key=lambda t: t.box[0] + t.box[2]):
        if thing.text is None:
            groups[thing.colour, thing.label] += 1
    parts = []
    for (colour, label), count in groups.items():
        one, many = CLASS_WORDS[pack().classes[label]]
        noun = one.split(" ", 1)[1] if count == 1 else many
        article = ("an" if noun[0] in "aeiou" and colour is None else "a") if count == 1 else _NUMBERS[count]
        parts.append(" ".join(part for part in (article, colour, noun) if part))
    signs = sum(thing.text is not None for thing in scene.objects)
    if signs:
        parts.append("a sign" if signs == 1 else "two signs")
    return ", ".join(parts).capitalize() + "."


class ScenesVqa(Scenes):
    """One split: the images of ``scenes`` and several questions each.

    Args:
        split: ``train`` or ``val``.
        n: number of scenes.
        size: side of the images in pixels.
        seed: which set of scenes.
    """

    name = "scenes-vqa"

    def questions(self, index: int) -> tuple[Question, ...]:
        """Presence (up to two with yes, as many with no), counting, colour, position, reading, referring to a box; in ``train``
        what there is to learn from besides comes last: a caption, and a few words about every object's box."""
        scene = self.scene(index)
        out = ask(scene, self.seed, self.split, index)
        if self.split == "train":
            out += (Question(CAPTION, "Describe the image.", describe(scene)), *_regions(scene))
        return out

    @property
    def fingerprint(self) -> str:
        """sha256 over what decides the scenes, and the version of the questions."""
        base = fingerprint(self.split, self.n, self.side, self.seed, GENERATOR, pack().fingerprint)
        return files_fingerprint([], {"dataset": self.name, "version": VERSION, "scenes": base})

    def answer_table(self) -> dict[str, Counter[str]]:
        """kind -> how often each answer occurs: what a guess without the image can lean on."""
        table: dict[str, Counter[str]] = {}
        for index in range(len(self)):
            for question in self.questions(index):
                table.setdefault(question.kind, Counter())[question.answer] += 1
        return table


class ScenesVqaOptions(DatasetOptions):
    """Options of the reader: scenes of each split, their side in pixels, the seed."""

    size: int = Field(224, ge=MIN_SIZE, le=MAX_SIZE)
    seed: int = Field(0, ge=0, lt=1 << 32)
    n_train: int = Field(1500, ge=1, le=1_000_000)
    n_val: int = Field(200, ge=1, le=1_000_000)


def factory(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``scenes-vqa``: made in memory; no folder of data is read."""
    given = check_options("scenes-vqa", ScenesVqaOptions, options)
    if data is not None:
        raise UsageError("dataset 'scenes-vqa' is made in memory and reads no folder", "leave --data out for it")
    return ScenesVqa(split, given.n_train if split == "train" else given.n_val, given.size, given.seed)
