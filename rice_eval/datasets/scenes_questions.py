"""Questions about a rendered scene, with answers read off its truth, drawn so that a guess without the image is near chance."""

from __future__ import annotations

from collections import Counter

from rice_eval.datasets.base import Question
from rice_eval.datasets.scenes_pack import SPLITS, pack
from rice_eval.datasets.scenes_raster import Draws
from rice_eval.datasets.scenes_render import Object, Scene

__all__ = ["CLASS_WORDS", "KINDS", "questions"]

KINDS = ("presence", "counting", "colour", "position", "reading", "box")

CLASS_WORDS: dict[str, tuple[str, str]] = {
    "mammal": ("a mammal", "mammals"),
    "bird": ("a bird", "birds"),
    "sea animal": ("a sea animal", "sea animals"),
    "bug": ("a bug", "bugs"),
    "fruit": ("a fruit", "fruits"),
    "vegetable": ("a vegetable", "vegetables"),
    "food": ("a prepared food", "prepared foods"),
    "drink": ("a drink", "drinks"),
    "plant": ("a plant or flower", "plants or flowers"),
    "vehicle": ("a vehicle", "vehicles"),
    "building": ("a building", "buildings"),
    "music": ("a piece of music gear", "pieces of music gear"),
    "sport": ("a piece of sports gear", "pieces of sports gear"),
    "tool": ("a tool", "tools"),
    "clothing": ("a piece of clothing", "pieces of clothing"),
}
"""Each class with its article, and in the plural."""

_APART = 0.15  # of the image's side: centres of boxes nearer than this are not asked about


def _the(thing: Object) -> str:
    """How a question speaks of an object whose class (or, for signs, text) is unique in the scene."""
    if thing.text is not None:
        return f"sign that says '{thing.text}'"
    words = CLASS_WORDS[pack().classes[thing.label]][0]
    return words.split(" ", 1)[1]


def _presence(scene: Scene, draws: Draws) -> Question:
    classes = pack().classes
    there = {thing.label for thing in scene.objects if thing.text is None}
    # The answer is drawn first, so that yes and no are equally likely for every class.
    yes = draws.below(2) == 0
    pool = [k for k in range(len(classes)) if (k in there) == yes]
    asked = CLASS_WORDS[classes[pool[draws.below(len(pool))]]][0]
    return Question("presence", f"Is there {asked} in the image? Answer yes or no.", "yes" if yes else "no")


def _counting(scene: Scene, draws: Draws) -> Question:
    # Scenes repeat one class one to three times, each as often: asking about the most frequent class balances answers.
    counts = Counter(thing.label for thing in scene.objects if thing.text is None)
    most = max(counts.values())
    pool = sorted(label for label, count in counts.items() if count == most)
    asked = CLASS_WORDS[pack().classes[pool[draws.below(len(pool))]]][1]
    return Question("counting", f"How many {asked} are in the image? Answer with a number.", str(most))


def _colour(scene: Scene, unique: list[Object], draws: Draws) -> Question | None:
    pool = [thing for thing in unique if thing.colour is not None]
    if not pool:
        return None
    thing = pool[draws.below(len(pool))]
    return Question("colour", f"What colour is the {_the(thing)}? Answer with one word.", str(thing.colour))


def _position(scene: Scene, unique: list[Object], draws: Draws) -> Question | None:
    side = scene.image.shape[0]
    pool = []
    for k, a in enumerate(unique):
        for b in unique[k + 1 :]:
            for axis in (0, 1):
                gap = (a.box[axis] + a.box[axis + 2] - b.box[axis] - b.box[axis + 2]) / 2
                if abs(gap) >= _APART * side:
                    pool.append((a, b, axis, gap < 0))
    if not pool:
        return None
    a, b, axis, before = pool[draws.below(len(pool))]
    if draws.below(2):
        a, b, before = b, a, not before
    if axis == 0:
        text = f"Is the {_the(a)} to the left or to the right of the {_the(b)}? Answer left or right."
        return Question("position", text, "left" if before else "right")
    text = f"Is the {_the(a)} above or below the {_the(b)}? Answer above or below."
    return Question("position", text, "above" if before else "below")


def _reading(scene: Scene, draws: Draws) -> Question | None:
    signs = [thing for thing in scene.objects if thing.text is not None]
    pool = [sign for sign in signs if sign.legible]
    if not pool:
        return None
    sign = pool[draws.below(len(pool))]
    which = f"{sign.colour} sign" if len(signs) > 1 else "sign"
    return Question("reading", f"What does the {which} say?", str(sign.text))


def _box(scene: Scene, draws: Draws) -> Question:
    side = scene.image.shape[0]
    things = [thing for thing in scene.objects if thing.text is None]
    thing = things[draws.below(len(things))]
    x0, y0, x1, y1 = thing.box
    where = ", ".join(f"{value / side:.3f}" for value in (x0, y0, x1, y1))
    classes = pack().classes
    text = f"What is in the box [{where}]? Answer with one of: {', '.join(classes)}."
    return Question("box", text, classes[thing.label], (float(x0), float(y0), float(x1), float(y1)))


def questions(scene: Scene, seed: int, split: str, index: int) -> tuple[Question, ...]:
    """At most one question of each of ``KINDS``; a kind that the scene has no clear case of is left out.

    Boxes in the wording are fractions of the image's side (x0, y0, x1, y1); ``Question.box`` is in pixels.
    """
    draws = Draws(seed, SPLITS.index(split), index, 4)
    counts = Counter(thing.label for thing in scene.objects if thing.text is None)
    unique = [t for t in scene.objects if (t.legible if t.text is not None else counts[t.label] == 1)]
    if len({t.text for t in unique if t.text is not None}) < sum(t.text is not None for t in unique):
        unique = [t for t in unique if t.text is None]  # two signs with the same words
    found = (
        _presence(scene, draws),
        _counting(scene, draws),
        _colour(scene, unique, draws),
        _position(scene, unique, draws),
        _reading(scene, draws),
        _box(scene, draws),
    )
    return tuple(question for question in found if question is not None)
