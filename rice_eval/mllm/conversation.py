"""What is said to a multimodal model: requests to answer, and conversations to learn from. Light: no torch at import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Union

from rice_eval.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["IMAGE", "Encoded", "Example", "Picture", "Request", "Turn"]

#: Where an image stands in a text, as in LLaVA's data files.
IMAGE = "<image>"


@dataclass(frozen=True)
class Encoded:
    """An image that has been through the encoder already (a bank's tokens).

    Attributes:
        tokens: ``(T, N, D)`` patch tokens of its T tiles in raster order, base image first; one tile where images are single.
            ``(N, D)`` is taken as one tile.
        grid: ``(h, w)`` of every tile, ``N = h * w``.
        size: ``(H, W)`` of the image in pixels; needed by ``anyres`` alone, which cuts the padding away.
    """

    tokens: Tensor
    grid: tuple[int, int]
    size: tuple[int, int] | None = None


Picture = Union["Image", Encoded]


@dataclass(frozen=True)
class Request:
    """One thing to answer.

    Attributes:
        prompt: the user's words. Each ``<image>`` in it stands for one image, in order; without any, images come first, each
            followed by a newline.
        images: what the prompt is about; none for the blind control.
        system: a system message in place of the template's own; None leaves the template alone.
        raw: take ``prompt`` as the model's whole input, with no chat template.
    """

    prompt: str
    images: tuple[Picture, ...] = ()
    system: str | None = None
    raw: bool = False


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Example:
    """A conversation to learn from: the loss counts the assistant's words (and what ends its turn) alone.

    Attributes:
        turns: from the first to the last; an answer last.
        images: for the ``<image>`` marks of all turns, in order; without any mark they come before the first user's words.
        plain: no template: images, the last turn's words, a newline (LLaVA's captions of stage 1, ``--version plain``).
    """

    turns: tuple[Turn, ...]
    images: tuple[Picture, ...] = ()
    plain: bool = False

    def __post_init__(self) -> None:
        if not self.turns or self.turns[-1].role != "assistant":
            raise UsageError("a conversation to learn from ends with the assistant's words", "drop the open last turn")
