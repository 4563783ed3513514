"""Which registry parts a trained model is made of, as data: enough to build it again before its weights are put in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rice_eval.adapters import load_encoder
from rice_eval.errors import CheckpointError, UsageError
from rice_eval.mllm import checkpoints
from rice_eval.mllm.lm import load_lm
from rice_eval.mllm.model import Mllm
from rice_eval.mllm.projector import Projector
from rice_eval.mllm.tiling import Tiling
from rice_eval.mllm.trained import TOLD, load_trained

__all__ = ["Parts", "load_folder", "load_model", "read_parts"]


@dataclass(frozen=True)
class Parts:
    """A LLaVA-style model by the names of its parts.

    Attributes:
        encoder, weights: registry name, and a checkpoint in place of its card's source.
        lm: see ``load_lm``.
        projector: one of ``projector.KINDS``.
        layer, norm: see ``Mllm.build``.
        tiles: ``anyres`` (LLaVA-NeXT's five shapes), or ``crop``: shorter side to ``side``, centre cropped, as LLaVA's stage 1.
        side: pixels of a tile; 0 for the encoder's native side.
        seed: of the projector's first weights.
    """

    encoder: str
    lm: str
    weights: str | None = None
    projector: str = "mlp2x_gelu"
    layer: int = -2
    norm: bool = False
    tiles: Literal["anyres", "crop"] = "anyres"
    side: int = 0
    seed: int = 0

    def build(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Mllm:
        """The model before any training.

        Raises:
            RiceEvalError: parts that can't be loaded or do not fit.
        """
        if self.tiles not in ("anyres", "crop"):
            raise UsageError(f"tiles '{self.tiles}' are not known", "choose anyres or crop")
        encoder = load_encoder(self.encoder, weights=self.weights, device=device)
        lm = load_lm(self.lm, dtype=dtype, device=device)
        side = self.side or encoder.facts.resolution
        tiling = Tiling.anyres(side) if self.tiles == "anyres" else Tiling("single", side, "crop")
        (layer,) = encoder.resolve_layers([self.layer])
        projector = Projector.new(self.projector, encoder.facts.widths[layer - 1], lm.width, self.seed)
        return Mllm.build(encoder, lm, projector, layer=layer, norm=self.norm, tiling=tiling)

    def facts(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def read_parts(folder: Path) -> Parts:
    """The parts of the model a recipe trained into ``folder``.

    Raises:
        CheckpointError: no finished training, or one of a model that was no registry parts.
    """
    try:
        return Parts(**json.loads((folder / TOLD).read_text())["parts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: holds no finished training of registry parts ({type(error).__name__})", "let the recipe end"
        ) from error


def load_folder(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, parts: Parts | None = None
) -> Mllm:
    """The model a recipe trained into ``folder``, with what its earlier stages trained.

    Args:
        folder: written by ``train`` with ``parts``.
        device, dtype: see ``load_lm``.
        parts: in place of the folder's own, where the next stage cuts images in another way.

    Raises:
        CheckpointError: a folder that is not whole, or whose parts changed since.
    """
    mllm = (parts or read_parts(folder)).build(device, dtype)
    told = load_trained(mllm, folder)
    had, now = told["trained"], mllm.facts()
    odd = [key for key in ("encoder", "lm") if had[key]["sha256"] != now[key]["sha256"] and dtype == torch.float32]
    if odd:
        raise CheckpointError(
            f"{folder}: its {' and '.join(odd)} are not those of the training", "give the same parts, or train again"
        )
    return mllm


def load_model(path: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Mllm:
    """A model to judge: what a recipe trained into a folder, or a published checkpoint (``checkpoints.load``).

    Raises:
        CheckpointError: neither.
    """
    folder = Path(path).expanduser()
    if (folder / TOLD).is_file():
        return load_folder(folder, device, dtype or torch.float32)
    return checkpoints.load(path, dtype=dtype, device=device)
