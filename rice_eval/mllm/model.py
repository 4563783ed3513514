"""A LLaVA-style model from registry parts: encoder, projector, language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rice_eval.mllm.conversation import IMAGE, Encoded, Example, Picture, Request, Turn

if TYPE_CHECKING:
    import torch

    from rice_eval.adapters.base import Encoder
    from rice_eval.mllm.lm import LanguageModel
    from rice_eval.mllm.projector import Projector
    from rice_eval.mllm.tiling import Tiling

__all__ = ["IMAGE", "Encoded", "Example", "Mllm", "Picture", "Request", "Turn"]


class Mllm:
    """An encoder, a projector and a language model that speak to each other."""

    encoder: Encoder
    projector: Projector
    lm: LanguageModel
    tiling: Tiling
    layers: tuple[int, ...]
    norm: bool

    @classmethod
    def build(
        cls,
        encoder: Encoder,
        lm: LanguageModel,
        projector: Projector,
        *,
        layer: int | Sequence[int] = -2,
        norm: bool = False,
        tiling: Tiling,
        newline: Tensor | None = None,
    ) -> Mllm:
        """Put the parts together; ``Projector.new(kind, encoder width, lm.width)`` and ``Tiling.single("square=448")`` make the others.

        Raises:
            PlanError: parts that do not fit each other.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Mllm:
        """Move all parts; returns self."""
        raise NotImplementedError

    def encode(self, images: Sequence[Picture]) -> list[Encoded]:
        """Encoder tokens of images; those already encoded pass through. Equal images are encoded once."""
        raise NotImplementedError

    def image_tokens(self, images: Sequence[Picture]) -> list[Tensor]:
        """For each image ``(n_i, D_lm)``, as the language model sees it."""
        raise NotImplementedError

    def project(self, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int] | None = None) -> Tensor:
        """``(N, D_enc)`` banked tokens of a single view, or ``(T, N, D_enc)`` of tiles, -> ``(n, D_lm)``."""
        raise NotImplementedError

    def logits(self, request: Request) -> Tensor:
        """``(L, V)`` logits after each position of the request's input, images included."""
        raise NotImplementedError

    def generate(
        self, requests: Sequence[Request], max_new_tokens: int = 64, batch_size: int = 1, stop: Sequence[str] = ()
    ) -> list[str]:
        """Greedy answers, in the order of the requests; the same whatever ``batch_size``. ``stop``: cut at the first of these."""
        raise NotImplementedError

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Mean cross-entropy over the assistant's tokens of all examples; differentiable in whatever requires gradients."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 over encoder, projector, language model and all that ``facts`` says."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What a record says of the model: JSON values only."""
        raise NotImplementedError
