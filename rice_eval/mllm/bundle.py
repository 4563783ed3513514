"""A trained probe as a folder: ``mllm.yaml`` says what it is made of, ``projector.safetensors`` what was learned.

Encoder and language model are named, not copied; their fingerprints are checked when the folder is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import Encoder
from rice_eval.cards import first_problem
from rice_eval.errors import CheckpointError
from rice_eval.mllm.conversation import Encoded
from rice_eval.mllm.lm import LanguageModel, load_lm
from rice_eval.mllm.lm_identity import lm_identity
from rice_eval.mllm.model import Mllm
from rice_eval.mllm.probe import PooledProjector, load_projector, pool, projector_bytes, sha256_of
from rice_eval.mllm.sizes import MOST_PROMPT, MOST_SIDE, MOST_WIDTH
from rice_eval.mllm.tiling import Tiling
from rice_eval.mllm.vqa import TEMPLATE
from rice_eval.results.store import write_atomic, writing

__all__ = [
    "MANIFEST",
    "Bundle",
    "as_stored",
    "assemble",
    "bundle_files",
    "load_bundle",
    "mean_tokens",
    "read_manifest",
    "seen_as",
    "write_bundle",
]

MANIFEST = "mllm.yaml"
_WEIGHTS = "projector.safetensors"
_AGAIN = "train it again with rice-eval mllm"


Side = Annotated[int, Field(gt=0, le=MOST_SIDE)]
Width = Annotated[int, Field(gt=0, le=MOST_WIDTH)]


class Bundle(BaseModel):
    """What ``mllm.yaml`` says.

    Attributes:
        encoder, weights: registry name, and the checkpoint that replaced its source (None: the source).
        encoder_sha256: fingerprint that the encoder must have.
        lm, lm_files: the language model's name, and what ``lm_identity`` says of its files.
        view, layers, norm, stored: how tokens are made, and the number format they were banked in.
        side, hidden, prompt, width_in, width_out: of the projector.
        projector_sha256: of its weights.
        template: the chat template of training.
        tuned: parts that were trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[3] = 3
    encoder: str
    weights: str | None = None
    encoder_sha256: str
    lm: str
    lm_files: str
    view: str
    layers: tuple[int, ...]
    norm: bool
    stored: Literal["fp16", "bf16", "fp32", "int8"]
    side: Side
    hidden: Width
    prompt: Annotated[int, Field(ge=0, le=MOST_PROMPT)]
    width_in: Width
    width_out: Width
    projector_sha256: str
    template: str
    tuned: Annotated[tuple[str, ...], Field(min_length=1)] = ("projector",)


def bundle_files(bundle: Bundle, projector: PooledProjector) -> dict[str, bytes]:
    """Both files of a bundle: name -> bytes."""
    manifest = yaml.safe_dump(bundle.model_dump(mode="json"), sort_keys=False).encode()
    return {_WEIGHTS: projector_bytes(projector), MANIFEST: manifest}


def write_bundle(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write what ``bundle_files`` gave; the manifest last, so that a folder with one is whole.

    Raises:
        RecordError: the folder can't be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (_WEIGHTS, MANIFEST):
            write_atomic(folder / name, files[name])
    return folder


def read_manifest(folder: Path) -> Bundle:
    """What the folder says it is.

    Raises:
        CheckpointError: no such folder, or a manifest that does not fit.
    """
    path = folder / MANIFEST
    try:
        return Bundle.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})", _AGAIN) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid YAML", _AGAIN) from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}", _AGAIN) from error


def assemble(
    encoder: Encoder,
    lm: LanguageModel,
    projector: PooledProjector,
    layers: Sequence[int],
    norm: bool,
    view: str,
    template: str = TEMPLATE,
) -> Mllm:
    """The model of a probe: one tile through ``view``, tokens of all ``layers`` side by side.

    Raises:
        PlanError: parts of different widths.
    """
    return Mllm.build(
        encoder, lm, projector, layer=tuple(layers), norm=norm, tiling=Tiling.single(view), template=template
    )


def load_bundle(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Mllm, Bundle]:
    """A trained probe from its folder, ready to answer.

    Args:
        folder: written by ``write_bundle``.
        device: torch device of all parts.
        dtype: of the language model.

    Raises:
        CheckpointError: a folder that is not whole, or parts that are not those of the training.
    """
    told = read_manifest(folder)
    encoder = load_encoder(told.encoder, weights=Path(told.weights) if told.weights else None, device=device)
    _same(folder, "encoder", told.encoder, encoder.fingerprint, told.encoder_sha256)
    _same(folder, "language model", told.lm, lm_identity(told.lm), told.lm_files)
    lm = load_lm(told.lm, dtype=dtype, device=device)
    shape: dict[str, Any] = {k: getattr(told, k) for k in ("width_in", "width_out", "side", "hidden", "prompt")}
    projector = load_projector(folder / _WEIGHTS, shape)
    _same(folder, "projector", _WEIGHTS, sha256_of(projector), told.projector_sha256)
    return assemble(encoder, lm, projector, told.layers, told.norm, told.view, told.template), told


def _same(folder: Path, part: str, name: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{folder}: {part} '{name}' is not the one of the training ({found[:12]} against {wanted[:12]})", _AGAIN
        )


def seen_as(mllm: Mllm, image: Any, stored: str | None, control: str = "") -> Any:
    """An image as a probe saw it in training.

    Args:
        mllm: the model.
        image: a PIL image.
        stored: the bank's number format, whose rounding is repeated; None shows the image itself.
        control: ``mean_image`` shows the training set's mean tokens instead.

    Returns:
        pooled tokens as ``Encoded``, or the image where the model is no probe.
    """
    projector = mllm.projector
    if stored is None or not isinstance(projector, PooledProjector):
        return image
    side = (projector.side, projector.side)
    if control == "mean_image":
        return Encoded(mean_tokens(projector), side)
    seen = mllm.encode([image])[0]
    return Encoded(pool(as_stored(seen.tokens, stored).float(), seen.grid, projector.side), side)


def mean_tokens(projector: PooledProjector) -> Tensor:
    """``(1, side**2, D)``: the training set's mean in every cell."""
    return projector.mean.expand(1, projector.side**2, -1).clone()


def as_stored(tokens: Tensor, stored: str) -> Tensor:
    """Tokens with the rounding of the bank's number format (``int8``: per-token scales, as the bank's own codec)."""
    if stored == "int8":
        raise CheckpointError("a probe on an int8 bank answers from the bank alone", "train it with --set tokens=fp16")
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[stored]
    return tokens.to(kind)
