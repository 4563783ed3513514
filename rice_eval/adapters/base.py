"""The contract between an encoder and everything else: ``Encoder`` gives ``Tokens``."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rice_eval.cards import EncoderCard, FamilyCard
from rice_eval.errors import PlanError, UsageError

__all__ = [
    "COMPILED",
    "Adapter",
    "EmbedsImage",
    "EmbedsPatches",
    "EmbedsText",
    "Encoder",
    "EncoderFacts",
    "HasRegionFeatures",
    "LoadRequest",
    "ProjectsTokens",
    "Tokens",
    "fingerprint_of",
]


#: The note of an encoder whose blocks were compiled.
COMPILED = "blocks run through torch.compile"


@dataclass(frozen=True)
class Tokens:
    """What an encoder says of a batch of images.

    Attributes:
        patches: layer -> ``(B, N, D)`` patch tokens in raster order. Keys are the layers' numbers, counted from 1.
        grids: layer -> ``(h, w)`` with ``N = h * w``; the same for every block of a ViT, one a stage for a CNN.
        cls: ``(B, D)`` class token of the deepest layer asked for, with the same norm; None where there is none.
        registers: ``(B, R, D)`` register tokens of the deepest layer asked for; None where there are none.
        norm: whether the final norm was asked for; None where whoever made the tokens does not say.
    """

    patches: Mapping[int, Tensor]
    grids: Mapping[int, tuple[int, int]]
    cls: Tensor | None = None
    registers: Tensor | None = None
    norm: bool | None = None

    @property
    def last(self) -> Tensor:
        """``(B, N, D)`` patch tokens of the deepest layer present."""
        return self.patches[max(self.patches)]


@dataclass(frozen=True)
class EncoderFacts:
    """What a record says of an encoder; all in it is printed, none of it is guessed.

    Attributes:
        name: the registry's name.
        family: the family card's name.
        arch: architecture in words.
        params: parameters of the image tower.
        patch: pixels a side of a patch; for a CNN the largest stride.
        resolution: native side in pixels.
        layers: number of blocks of a ViT, of stages of a CNN; layers are counted from 1.
        widths: D of each layer.
        strides: pixels a token of each layer covers.
        mean, std: the normalisation of images in [0, 1].
        abilities: what it can do besides ``encode``: ``text``, ``image``, ``regions``.
        license: of the weights.
        source: where the weights came from, in words (hub id and revision, package and version, file name).
        sha256: fingerprint of weights and architecture.
        notes: what a reader should know (keys dropped on purpose, positions interpolated, …).
    """

    name: str
    family: str
    arch: str
    params: int
    patch: int
    resolution: int
    layers: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    abilities: tuple[str, ...] = ()
    license: str | None = None
    source: str = ""
    sha256: str = ""
    notes: tuple[str, ...] = ()


class Encoder(ABC):
    """A frozen image encoder. Subclasses set ``facts`` and write ``_encode``."""

    facts: EncoderFacts
    device: torch.device = torch.device("cpu")

    @property
    def name(self) -> str:
        """The registry's name."""
        return self.facts.name

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights' tensors (names, shapes, dtypes, bytes) and of the architecture's numbers."""
        return self.facts.sha256

    @property
    def multiple(self) -> int:
        """Both sides of an image must be a multiple of this many pixels."""
        return self.facts.patch

    def resolve_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Layer numbers counted from 1, sorted, without repeats; -1 is the last.

        Raises:
            PlanError: a number outside ``1..layers`` and ``-layers..-1``.
        """
        depth = self.facts.layers
        resolved = set()
        for layer in layers:
            number = depth + 1 + layer if layer < 0 else layer
            if not 1 <= number <= depth:
                raise PlanError(
                    f"encoder '{self.name}' has layers 1 to {depth}, not {layer}", f"ask for 1..{depth} or -1..-{depth}"
                )
            resolved.add(number)
        return tuple(sorted(resolved))

    def check_size(self, height: int, width: int) -> None:
        """Refuse sides that the patch does not divide: nothing is cropped in silence.

        Raises:
            PlanError: a side that is no multiple of ``multiple``.
        """
        step = self.multiple
        if height % step or width % step or not height or not width:
            raise PlanError(
                f"encoder '{self.name}' takes sides that are multiples of {step} px, not {height} x {width}",
                f"choose a view such as square={max(1, round(height / step)) * step}",
            )

    @torch.inference_mode()
    def encode(self, images: Tensor, layers: Sequence[int] = (-1,), norm: bool = True) -> Tokens:
        """Tokens of a batch.

        Args:
            images: ``(B, 3, H, W)`` float in [0, 1], RGB; the encoder normalises them itself.
            layers: block numbers from 1, or negative from the last.
            norm: whether the final norm is applied to every layer's tokens. For an architecture that has none it changes nothing.

        Raises:
            UsageError: images of another shape or type.
            PlanError: a layer that does not exist, sides that the patch does not divide, or ``norm`` of a checkpoint that
                lacks the final norm its architecture has (a RICE tower inside LLaVA-OneVision-1.5).
        """
        return self.encode_with_grad(images, layers, norm)

    def encode_with_grad(self, images: Tensor, layers: Sequence[int] = (-1,), norm: bool = True) -> Tokens:
        """``encode`` outside inference mode: tokens carry a graph where weights of ``tunable()`` ask for gradients."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UsageError(
                f"encode takes float images (B, 3, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}"
            )
        self.check_size(int(images.shape[-2]), int(images.shape[-1]))
        return replace(self._encode(images.to(self.device), self.resolve_layers(layers), norm), norm=norm)

    @abstractmethod
    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        """``encode`` after its checks: ``layers`` are sorted numbers from 1 and ``images`` is on ``device``."""

    @abstractmethod
    def to(self, device: torch.device) -> Encoder:
        """Move the weights; returns self."""

    def tunable(self) -> torch.nn.Module:
        """The module whose weights a recipe may train.

        Raises:
            PlanError: this encoder runs outside torch's autograd, or shows no module.
        """
        raise PlanError(f"encoder '{self.name}' can't be tuned", "choose a recipe that leaves the encoder frozen")

    def compile(self) -> None:
        """Run the blocks (a CNN's stages) through ``torch.compile`` from now on, and say so in the facts' notes.

        Tokens may differ in the last digits. Sizes that were not seen before are compiled when they come.

        Raises:
            PlanError: an encoder that has nothing to compile.
            UsageError: torch.compile does not work on this machine.
        """
        parts = self._compilable()
        if not parts:
            raise PlanError(f"encoder '{self.name}' can't be compiled", "leave out --compile")
        try:
            torch.compile(torch.neg)(torch.ones(2, device=self.device))
        except Exception as error:  # no C++ compiler, no Triton, a Python that dynamo does not know: kinds of their own
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            raise UsageError(
                f"--compile: torch.compile does not work here ({type(error).__name__}: {reason})", "leave out --compile"
            ) from error
        for part in parts:
            part.forward = torch.compile(part.forward)
        self.facts = replace(self.facts, notes=(*self.facts.notes, COMPILED))

    def _compilable(self) -> Sequence[torch.nn.Module]:
        """The modules whose forwards are compiled one by one; their forward hooks run outside."""
        return ()

    @contextmanager
    def _as_written(self) -> Iterator[None]:
        """Within it nothing runs compiled."""
        compiled = {part: part.__dict__.pop("forward") for part in self._compilable() if "forward" in part.__dict__}
        try:
            yield
        finally:
            for part, forward in compiled.items():
                part.forward = forward

    def flops(self, height: int, width: int) -> int | None:
        """Multiply-adds times two of one image's forward, or None where they can't be counted. Forwards one blank image."""
        from torch.utils.flop_counter import FlopCounterMode

        try:
            with self._as_written(), FlopCounterMode(display=False) as counter:
                self.encode(torch.zeros(1, 3, height, width), layers=(-1,))
        except Exception:  # the counter meets operators it does not know; a missing figure must not end a run
            return None
        return int(counter.get_total_flops()) or None


@runtime_checkable
class EmbedsText(Protocol):
    """An encoder with a text tower."""

    def embed_text(self, texts: list[str]) -> Tensor:
        """``(len(texts), E)`` embeddings, L2-normalised."""
        ...


@runtime_checkable
class EmbedsImage(Protocol):
    """An encoder that embeds whole images into the text space."""

    def embed_image(self, images: Tensor) -> Tensor:
        """``(B, E)`` L2-normalised embeddings of ``(B, 3, H, W)`` images in [0, 1]."""
        ...


@runtime_checkable
class EmbedsPatches(Protocol):
    """An encoder that places its patches in the text space."""

    def embed_patches(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``(B, N, E)`` embeddings of ``(B, 3, H, W)`` images in [0, 1], in raster order, and their grid ``(h, w)``."""
        ...


@runtime_checkable
class ProjectsTokens(Protocol):
    """An encoder whose class token reaches the text space by a linear map, which patch tokens can take too."""

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """``(n, D)`` last-layer tokens after the final norm (or means of such) -> ``(n, E)`` in the text space, not normalised.

        Raises:
            PlanError: this checkpoint has no such map.
        """
        ...


@runtime_checkable
class HasRegionFeatures(Protocol):
    """An encoder with a region head of its own (CLOC's Prompter). Everyone else gets RoIAlign of patch tokens."""

    def region_features(self, tokens: Tokens, boxes: list[Tensor]) -> list[Tensor]:
        """For each image, ``(n, E)`` features of its ``(n, 4)`` boxes, xyxy in units of the encoded image's sides (0 to 1)."""
        ...


@dataclass(frozen=True)
class LoadRequest:
    """What an adapter is asked to load.

    Attributes:
        card: the checkpoint's card.
        family: the family's card.
        weights: a file or folder that replaces the card's source; None for the card's own.
        trust_remote_code: whether code shipped with a checkpoint may run.
    """

    card: EncoderCard
    family: FamilyCard
    weights: Path | None = None
    trust_remote_code: bool = False


class Adapter(Protocol):
    """What the registry holds under an adapter's name: a function from a request to an encoder on the CPU, in eval mode."""

    def __call__(self, request: LoadRequest) -> Encoder: ...


def fingerprint_of(tensors: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> str:
    """sha256 over tensors (names, shapes, dtypes, bytes) and the architecture's numbers, whatever the order of either."""
    digest = hashlib.sha256()
    digest.update(json.dumps(architecture, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def facts_as_dict(facts: EncoderFacts) -> dict[str, Any]:
    """The facts as plain JSON values."""
    return json.loads(json.dumps(asdict(facts)))  # type: ignore[no-any-return]
