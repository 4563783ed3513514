"""Short-answer questions about images: conversations to learn from, requests to answer, in LLaVA's formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rice_eval.datasets.base import Dataset, Question
from rice_eval.datasets.scenes_vqa import CAPTION, POST_PROMPT, REGION
from rice_eval.errors import DataError
from rice_eval.mllm.conversation import IMAGE, Turn

__all__ = ["PROMPT", "TEMPLATE", "Asked", "Dialogue", "asked", "dialogues", "llava_entries", "prompt_of"]

# A small instruction-tuned model answers questions about a written list of things far better after a worked example in plain
# lines than in its own chat format (docs/mllm.md has figures), and what it can't do with words it can't do with images.
_EXAMPLE = """\
Image: a red car, two blue dogs, a white cup.
Q: Is there a dog in the image?
A: Yes
Q: What colour is the car?
A: Red
Q: Is there a cat in the image?
A: No
Q: How many dogs are in the image?
A: 2
Q: Is the car to the left or right of the cup?
A: Left
"""

TEMPLATE = (
    _EXAMPLE
    + """
{% for m in messages %}
{% set said = m['content'] | replace(POST_PROMPT, '') %}
{% if m['role'] == 'user' %}
{{ said | replace('<image>\\n', 'Image: <image>\\nQ: ') if '<image>' in said else 'Q: ' + said }}
A:
{%- else %}
{{ ' ' + said }}
{% endif %}
{% endfor %}""".replace("POST_PROMPT", repr(POST_PROMPT))
)
"""Chat template of the probe: one worked example in words, then the image and the questions in the same plain lines, each
answer ended by its line's end. The short-answer words are left out, since the example shows the form."""


PROMPT = " The objects in the image are listed above, one for each place."
"""What a probe's learned embeddings behind the image begin as."""


def prompt_of(question: str) -> str:
    """A question asked alone, with the short-answer words of LLaVA-1.5."""
    return question + POST_PROMPT


@dataclass(frozen=True)
class Dialogue:
    """What is said about one training image: questions with answers, captions, and a few words about boxes."""

    questions: tuple[Question, ...]
    captions: tuple[Question, ...] = ()
    regions: tuple[Question, ...] = ()

    def turns(self) -> tuple[Turn, ...]:
        """User and assistant in turn; captions come last, so that no answer can be read off them."""
        out: list[Turn] = []
        for q in (*self.questions, *self.captions):
            out += [Turn("user", q.question), Turn("assistant", q.answer)]
        return tuple(out)


def dialogues(dataset: Dataset, captions: bool = True) -> list[Dialogue]:
    """What is said about each image of a training split; ``captions`` False leaves captions out.

    Raises:
        DataError: an image nothing is said about.
    """
    out = []
    for index in range(len(dataset)):
        said = dataset.questions(index)
        told = Dialogue(
            tuple(q for q in said if q.kind not in (CAPTION, REGION)),
            tuple(q for q in said if captions and q.kind == CAPTION),
            tuple(q for q in said if q.kind == REGION),
        )
        if not told.turns():
            raise DataError(
                f"dataset '{dataset.name}': image {dataset.image_id(index)} has no question", "leave it out"
            )
        out.append(told)
    return out


@dataclass(frozen=True)
class Asked:
    """A question of the test split: ``id`` is unique in it, ``index`` the image's."""

    id: str
    index: int
    image_id: str
    kind: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """What the model is asked, without template and image."""
        return prompt_of(self.question)


def asked(dataset: Dataset) -> list[Asked]:
    """All questions of a split, image by image."""
    return [
        Asked(f"{dataset.image_id(i)}-{k}", i, dataset.image_id(i), q.kind, q.question, q.answer)
        for i in range(len(dataset))
        for k, q in enumerate(dataset.questions(i))
        if q.kind not in (CAPTION, REGION)
    ]


def llava_entries(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """A split in the format of LLaVA's instruction files: ``id``, ``image``, ``conversations`` of ``human`` and ``gpt``."""
    names = {"user": "human", "assistant": "gpt"}
    for index, dialogue in enumerate(dialogues(dataset)):
        said = [{"from": names[turn.role], "value": turn.text} for turn in dialogue.turns()]
        said[0]["value"] = f"{IMAGE}\n{prompt_of(said[0]['value'])}"  # as in LLaVA-1.5's data
        yield {"id": dataset.image_id(index), "image": f"images/{dataset.image_id(index)}.png", "conversations": said}
