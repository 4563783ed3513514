"""A LLaVA-style model from registry parts: encoder, projector, language model.

The encoder sees tiles, the projector turns their tokens into embeddings, the embeddings stand where ``<image>`` stood, and the
language model goes on from there. Everything that changes an answer is in ``facts`` and so in the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rice_eval.adapters.base import Encoder, fingerprint_of
from rice_eval.errors import PlanError, UsageError
from rice_eval.mllm.chat import IGNORE, Chat
from rice_eval.mllm.conversation import IMAGE, Encoded, Example, Picture, Request, Turn
from rice_eval.mllm.generate import decode, greedy, left_padded
from rice_eval.mllm.llava_recipe import Recipe
from rice_eval.mllm.lm import LanguageModel
from rice_eval.mllm.projector import Projector
from rice_eval.mllm.sight import Sight
from rice_eval.mllm.tiling import Tiling, pack

__all__ = ["IMAGE", "Encoded", "Example", "Mllm", "Picture", "Request", "Turn"]


class Mllm:
    """An encoder, a projector and a language model that speak to each other.

    Attributes:
        sight: encoder, layers, norm and tiling: what turns images into tokens.
        projector: tokens to embeddings.
        newline: ``(D_lm,)`` embedding after every row of an ``anyres`` grid; None where there is none.
        lm: the language model.
        chat: template and tokenizer.
        tuned: recipes that parts of it were trained by here, in order.
    """

    def __init__(
        self, sight: Sight, projector: Projector, lm: LanguageModel, chat: Chat, newline: Tensor | None
    ) -> None:
        """Use ``build``, or ``rice_eval.mllm.checkpoints.load``.

        Raises:
            PlanError: parts of different widths.
        """
        if projector.width_in != sight.width:
            raise PlanError(
                f"the projector takes tokens of width {projector.width_in}, encoder '{sight.encoder.name}' gives {sight.width} "
                f"at layers {', '.join(map(str, sight.layers))}",
                "train a projector for this encoder",
            )
        if projector.width_out != lm.width:
            raise PlanError(
                f"the projector gives embeddings of width {projector.width_out}, language model '{lm.name}' takes {lm.width}",
                "train a projector for this language model",
            )
        self.sight, self.projector, self.lm, self.chat = sight, projector, lm, chat
        self.tuned: tuple[Recipe, ...] = ()
        self.newline = None if newline is None else nn.Parameter(newline.detach().clone(), requires_grad=False)
        self.to(self.device)

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
        template: str | None = None,
    ) -> Mllm:
        """Put the parts together; ``Projector.new(kind, encoder width, lm.width)`` and ``Tiling.single("square=448")`` make the others.

        Args:
            encoder: any of the registry.
            lm: see ``load_lm``.
            projector: of the encoder's width (times the number of layers) and the language model's.
            layer: block numbers from 1, or negative from the last; several are concatenated.
            norm: whether the encoder's final norm is applied.
            tiling: how images are cut.
            newline: see the class; ``anyres`` without one gets a seeded random one, as LLaVA-NeXT starts.
            template: chat template; None takes the tokenizer's own.

        Raises:
            PlanError: parts that do not fit each other.
        """
        sight = Sight(encoder, (layer,) if isinstance(layer, int) else tuple(layer), norm, tiling)
        sight.check_divides()
        if newline is None and tiling.kind == "anyres":
            draw = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
            newline = draw / lm.width**0.5  # LLaVA-NeXT, llava_arch.py
        return cls(sight, projector, lm, Chat(lm.tokenizer, template=template, stops=lm.stops), newline)

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self.sight.encoder

    @property
    def tiling(self) -> Tiling:
        """How images are cut."""
        return self.sight.tiling

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers read, counted from 1."""
        return self.sight.layers

    @property
    def norm(self) -> bool:
        """Whether the encoder's final norm is applied."""
        return self.sight.norm

    @property
    def device(self) -> torch.device:
        """Where the language model runs."""
        found: torch.device = self.lm.model.get_input_embeddings().weight.device
        return found

    def to(self, device: torch.device) -> Mllm:
        """Move all parts; returns self."""
        self.sight.encoder.to(device)
        self.projector.to(device)
        self.lm.model.to(device)
        if self.newline is not None:
            self.newline.data = self.newline.data.to(device)
        return self

    def encode(self, images: Sequence[Picture], alone: Sequence[bool] | None = None) -> list[Encoded]:
        """Encoder tokens of images; those already encoded pass through. Equal images are encoded once.

        Args:
            images: of any number of requests.
            alone: for each, whether its request has no other image (``Tiling.several``); by default all stand alone.

        Raises:
            DataError: an image the tiler can't open or cut.
        """
        return self.sight.encode(images, alone)

    def image_tokens(self, images: Sequence[Picture], alone: Sequence[bool] | None = None) -> list[Tensor]:
        """For each image ``(n_i, D_lm)``, as the language model sees it; arguments as of ``encode``.

        Raises:
            DataError: an image the tiler can't open or cut.
            UsageError: tokens that are not this model's.
        """
        return [self.project(e.tokens, e.grid, e.size) for e in self.encode(images, alone)]

    def project(self, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int] | None = None) -> Tensor:
        """Embeddings of encoded tiles; gradients flow where the projector's weights ask for them.

        Args:
            tokens: ``(N, D_enc)`` of a single view, or ``(T, N, D_enc)`` of tiles, base image first.
            grid: ``(h, w)`` of a tile.
            size: ``(H, W)`` of the image, for ``anyres``.

        Returns:
            ``(n, D_lm)`` in the language model's type.

        Raises:
            UsageError: tokens that are not this model's.
        """
        tiles = tokens if tokens.ndim == 3 else tokens[None]
        tiles = tiles.to(self.device)
        if tiles.is_inference():
            tiles = tiles.clone()  # what inference mode made can't be kept for a backward pass
        out = self.projector(tiles, grid)
        return pack(out, self.projector.grid_out(grid), self.tiling, size, self.newline).to(self.lm.dtype)

    def embed(self, ids: Sequence[int], images: Sequence[Tensor]) -> Tensor:
        """``(L, D_lm)``: words' embeddings, and images' ``(n_i, D_lm)`` where the placeholder stands.

        Args:
            ids: from ``chat``; as many placeholders as images.
            images: from ``image_tokens``.
        """
        table = self.lm.model.get_input_embeddings()
        pieces: list[Tensor] = []
        start, waiting = 0, iter(images)
        for place in [n for n, i in enumerate(ids) if i == self.chat.image_id] + [len(ids)]:
            if place > start:
                pieces.append(table(torch.tensor(ids[start:place], device=self.device)))
            if place < len(ids):
                pieces.append(next(waiting))
            start = place + 1
        return torch.cat(pieces)

    def _images_of(self, asked: Sequence[Request | Example]) -> list[Tensor]:
        """``image_tokens`` of all images of all requests, which go through the encoder together."""
        alone = [len(r.images) == 1 for r in asked for _ in r.images]
        return self.image_tokens([image for r in asked for image in r.images], alone)

    def _inputs(self, requests: Sequence[Request]) -> list[Tensor]:
        """``(L_i, D_lm)`` of each request."""
        asked = [self.chat.ask(r) for r in requests]
        tokens = iter(self._images_of(requests))
        return [self.embed(ids, [next(tokens) for _ in r.images]) for ids, r in zip(asked, requests)]

    @torch.inference_mode()
    def logits(self, request: Request) -> Tensor:
        """``(L, V)`` logits after each position of the request's input, images' positions included."""
        (inputs,) = self._inputs([request])
        self.check_room(inputs.shape[0])
        out: Tensor = self.lm.model(inputs_embeds=inputs[None], use_cache=False).logits[0]
        return out

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], max_new_tokens: int = 64, batch_size: int = 1, stop: Sequence[str] = ()
    ) -> list[str]:
        """Greedy answers in the order of the requests; ``batch_size`` changes the speed, and answers only where two tokens tie.

        Args:
            requests: what to answer.
            max_new_tokens: an answer's tokens at most.
            batch_size: requests that run together, padded on the left.
            stop: an answer is cut before the first of these.

        Raises:
            DataError: an image the tiler can't open or cut.
            PlanError: a request longer than the language model's context.
        """
        return [
            decode(self.chat.tokenizer, ids, self.chat.stops, stop)
            for ids in self.tokens(requests, max_new_tokens, batch_size)
        ]

    @torch.inference_mode()
    def tokens(self, requests: Sequence[Request], max_new_tokens: int = 64, batch_size: int = 1) -> list[list[int]]:
        """``generate``'s answers as token ids, what ended them included."""
        if batch_size < 1 or max_new_tokens < 1:
            raise UsageError("batch_size and max_new_tokens are at least 1", "give larger numbers")
        out: list[list[int]] = []
        for start in range(0, len(requests), batch_size):
            inputs = self._inputs(requests[start : start + batch_size])
            self.check_room(max(i.shape[0] for i in inputs) + max_new_tokens)
            embeds, mask = left_padded(inputs)
            out += greedy(self.lm.model, embeds, mask, max_new_tokens, self.chat.stops)
        return out

    def check_room(self, length: int) -> None:
        """Refuse what is longer than the language model's context.

        Raises:
            PlanError: so it is.
        """
        most = self.lm.context
        if most is not None and length > most:
            raise PlanError(
                f"a request of {length} tokens, answer included, where language model '{self.lm.name}' has room for {most}",
                "cut images into fewer tiles, use a projector that merges tokens, or choose another language model",
            )

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Mean cross-entropy over the assistant's tokens of all examples; differentiable in whatever requires gradients.

        Raises:
            DataError: an image the tiler can't open or cut.
            UsageError: an example that teaches nothing.
            PlanError: an example longer than the language model's context.
        """
        total, count = self.summed_loss(examples)
        return total / count

    def summed_loss(self, examples: Sequence[Example], max_length: int | None = None) -> tuple[Tensor, int]:
        """Cross-entropy summed over the assistant's tokens, and their number; see ``loss``.

        Args:
            examples: what is learnt.
            max_length: positions of an example, images' included; what is longer is cut at its end.
        """
        taught = [self.chat.learn(e) for e in examples]
        images = iter(self._images_of(examples))
        rows, targets = [], []
        for (ids, labels), example in zip(taught, examples):
            own = [next(images) for _ in example.images]
            rows.append(self.embed(ids, own)[:max_length])
            lengths = iter(t.shape[0] for t in own)
            spread = [
                label
                for i, known in zip(ids, labels)
                for label in ([IGNORE] * next(lengths) if i == self.chat.image_id else [known])
            ]
            targets.append(torch.tensor(spread[:max_length], device=self.device))
        self.check_room(max(r.shape[0] for r in rows))
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        wanted = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE)[:, 1:]
        lengths_ = torch.tensor([r.shape[0] for r in rows], device=self.device)
        mask = (torch.arange(embeds.shape[1], device=self.device)[None] < lengths_[:, None]).long()
        # Logits of the positions that some example is taught at, and of no other: a vocabulary's width each.
        places = (wanted != IGNORE).any(0).nonzero().flatten()
        logits = self.lm.model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=places
        ).logits.float()
        known = wanted[:, places]
        total = nn.functional.cross_entropy(logits.flatten(0, 1), known.flatten(), ignore_index=IGNORE, reduction="sum")
        return total, int((known != IGNORE).sum())

    def retuned(self, recipe: Recipe) -> None:
        """Parts were trained by ``recipe``: their fingerprints are others now, and ``facts`` says which parts."""
        self.tuned += (recipe,)
        if "lm" in recipe.tuned or "lm-lora" in recipe.tuned:
            self.lm.changed()
        if "tower" in recipe.tuned:
            self.sight.changed(recipe.name)

    def fingerprint(self) -> str:
        """sha256 over encoder, projector, newline, language model and all that ``facts`` says."""
        tensors = dict(self.projector.state_dict())
        if self.newline is not None:
            tensors["image_newline"] = self.newline
        told = json.dumps(self.facts(), sort_keys=True)
        return hashlib.sha256((fingerprint_of(tensors, {}) + told).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a record says of the model: JSON values only."""
        tensors = dict(self.projector.state_dict())
        return {
            **self.sight.facts(),
            "projector": {**self.projector.facts(), "sha256": fingerprint_of(tensors, {})},
            "newline": self.newline is not None,
            "lm": self.lm.facts(),
            **self.chat.facts(),
            "training": [{"recipe": r.name, "hash": r.hash(), "tuned": list(r.tuned)} for r in self.tuned],
        }
