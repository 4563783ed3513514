"""From turns to tokens: the tokenizer's own chat template, one placeholder an image, labels on the assistant's words."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

from rice_eval.errors import CheckpointError, UsageError
from rice_eval.mllm.conversation import IMAGE, Example, Request, Turn

__all__ = ["IGNORE", "Chat"]

#: Label of a position that the loss does not count, as torch's cross_entropy has it.
IGNORE = -100

#: For tokenizers without a template of their own: the words of LLaVA-1.5 (Vicuna's), no system message.
_PLAIN = (
    "{{ bos_token if bos_token else '' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] }}"
    "{{ eos_token if eos_token else '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_PROBE = "rice-eval-probe"
_MARK = "\ue000{}\ue001"  # private code points, which no text has a use for


class Chat:
    """A tokenizer that speaks in turns and knows where images stand.

    Args:
        tokenizer: a fast one of transformers; a copy is used.
        template: a chat template, such as a checkpoint's own; None takes the tokenizer's.
        image_token: the token that stands for an image in the checkpoint's vocabulary; None adds a placeholder ``<image>``
            beyond the vocabulary, which is never embedded.
        stops: tokens that end an answer besides the template's own end of turn.
    """

    def __init__(
        self, tokenizer: Any, *, template: str | None = None, image_token: str | None = None, stops: Sequence[int] = ()
    ) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.image_token = image_token or IMAGE
        if self.tokenizer.convert_tokens_to_ids(self.image_token) in (None, self.tokenizer.unk_token_id):
            self.tokenizer.add_special_tokens({"additional_special_tokens": [self.image_token]})
        self.image_id = int(self.tokenizer.convert_tokens_to_ids(self.image_token))
        own = template or getattr(self.tokenizer, "chat_template", None)
        if isinstance(own, dict):
            own = own.get("default")
        self.template: str = own or _PLAIN
        self.template_from = "given" if template else "tokenizer" if own else "none: 'USER: … ASSISTANT: …'"
        self._parts = True
        self._parts = self._takes_parts()
        rendered = self._render([Turn("user", "?"), Turn("assistant", _PROBE)], open_end=False)
        rest = rendered.rpartition(_PROBE)[2]
        line = not rest.strip() and rest.startswith("\n")  # a turn that its line's end alone ends
        self._tail = "\n" if line else rest.rstrip()
        tail = self.tokenizer(self._tail, add_special_tokens=False).input_ids if self._tail else []
        ends = {int(s) for s in stops}
        added = self.tokenizer.added_tokens_decoder
        if tail and tail[0] in added and added[tail[0]].special:
            ends.add(int(tail[0]))
        if line:
            # What ends a line inside a text: alone, sentencepiece puts a word's beginning before it.
            last = self.learn(Example((Turn("user", "?"), Turn("assistant", _PROBE))))[1][-1]
            if last != IGNORE and self.tokenizer.decode([last]) == "\n":
                ends.add(last)
        if self.tokenizer.eos_token_id is not None:
            ends.add(int(self.tokenizer.eos_token_id))
        self.stops = tuple(sorted(ends))

    def facts(self) -> dict[str, str]:
        """Where the template comes from, and its sha256."""
        return {"template": self.template_from, "template_sha256": hashlib.sha256(self.template.encode()).hexdigest()}

    def ask(self, request: Request) -> list[int]:
        """Token ids of a request, up to where the answer begins; ``image_id`` once for every image.

        Raises:
            UsageError: the prompt has another number of ``<image>`` marks than there are images.
        """
        if request.raw:
            text = request.prompt.replace(IMAGE, self.image_token)
        else:
            turns = [] if request.system is None else [Turn("system", request.system)]
            turns.append(Turn("user", _place_images(request.prompt, len(request.images))))
            text = self._render(turns, open_end=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=request.raw).input_ids
        self._check(ids, len(request.images))
        return ids

    def learn(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation; a label is the id itself, or ``IGNORE`` outside the assistant's words.

        Raises:
            UsageError: marks and images that do not match, or nothing to learn.
            CheckpointError: the chat template changes the turns' words.
        """
        if example.plain:
            answer = example.turns[-1].text.strip()
            text = self.image_token * len(example.images) + answer + "\n"
            spans = [(len(text) - len(answer) - 1, len(text))]
        else:
            text, spans = self._spans(example)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = coded.input_ids
        labels = [
            token if any(_inside(start, stop, first, last) for first, last in spans) else IGNORE
            for token, (start, stop) in zip(ids, coded.offset_mapping)
        ]
        self._check(ids, len(example.images))
        if all(label == IGNORE for label in labels):
            raise UsageError("a conversation without a word of the assistant's", "drop it from the data")
        return ids, labels

    def _spans(self, example: Example) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and where the assistant's words and the end of each turn lie in it."""
        turns = list(example.turns)
        marks = sum(t.text.count(IMAGE) for t in turns)
        if not marks and example.images:
            first = next((i for i, t in enumerate(turns) if t.role == "user"), None)
            if first is None:
                raise UsageError("a conversation with images and no user's words", "give the images a turn")
            turns[first] = Turn("user", _place_images(turns[first].text, len(example.images)))
        # Rendered with marks in the words' places, so that words can't be mistaken for the template's own.
        turns = [Turn(t.role, t.text.strip()) for t in turns]
        words = [piece.strip() for t in turns for piece in t.text.split(IMAGE)]
        roles = [t.role for t in turns for _ in t.text.split(IMAGE)]
        marked, n = [], 0
        for turn in turns:
            pieces = []
            for piece in turn.text.split(IMAGE):
                pieces.append(piece.replace(piece.strip(), _MARK.format(n), 1) if piece.strip() else piece)
                n += 1
            marked.append(Turn(turn.role, IMAGE.join(pieces)))
        bones = self._render(marked, open_end=False)
        text, spans = "", []
        for n, (word, role) in enumerate(zip(words, roles)):
            if not word:
                continue
            before, mark, bones = bones.partition(_MARK.format(n))
            if not mark:
                break
            text += before
            start = len(text)
            text += word
            if role == "assistant":
                held = bones.startswith(self._tail)
                spans.append((start, len(text) + (len(self._tail) if held else 0)))
        text += bones
        if text != self._render(turns, open_end=False):
            raise CheckpointError("the chat template changes what is said", "give another template")
        return text, spans

    def _takes_parts(self) -> bool:
        """Templates of multimodal processors walk over typed parts; those of language models add strings: seen by trying."""
        try:
            said = self._render([Turn("user", f"{IMAGE}{_PROBE}")], open_end=False)
        except CheckpointError:
            return False
        return self.image_token in said and _PROBE in said and "'type'" not in said

    def _render(self, turns: Sequence[Turn], *, open_end: bool) -> str:
        messages = [{"role": t.role, "content": self._content(t.text)} for t in turns]
        try:
            # Templates that know no thinking ignore the option.
            out = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=open_end,
                enable_thinking=False,
            )
        except Exception as error:  # jinja's errors and those a template raises itself
            roles = ", ".join(t.role for t in turns)
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"the chat template refuses turns of {roles} ({reason})", "give another template"
            ) from error
        return str(out)

    def _content(self, text: str) -> Any:
        if not self._parts:
            return text.replace(IMAGE, self.image_token)
        parts: list[dict[str, str]] = []
        for n, piece in enumerate(text.split(IMAGE)):
            if n:
                parts.append({"type": "image"})
                piece = piece.removeprefix("\n")  # the template separates image and words itself
            if piece:
                parts.append({"type": "text", "text": piece})
        return parts

    def _check(self, ids: Sequence[int], images: int) -> None:
        marks = sum(i == self.image_id for i in ids)
        if marks != images:
            raise UsageError(
                f"a prompt with {marks} image marks and {images} images",
                f"write {IMAGE} once for every image, or never",
            )


def _place_images(prompt: str, images: int) -> str:
    """LLaVA's habit: without a mark, images come first, each with a newline."""
    return prompt if IMAGE in prompt else f"{IMAGE}\n" * images + prompt


def _inside(start: int, stop: int, first: int, last: int) -> bool:
    """Whether a token's characters lie in a span; a token trimmed to nothing counts where it stands inside."""
    return (start < last and stop > first) if stop > start else first < start <= last
