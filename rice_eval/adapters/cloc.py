"""CLOC: reading and writing its layout, and the encoder with box prompts, text prompts and grounding.

Layout, version 1: ``model.safetensors`` with ``ClocModel``'s names, its numbers as JSON in the header's metadata under
``cloc`` and again in ``config.json`` (``model_type: cloc``), the tokenizer's files beside them. See docs/encoders.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rice_eval.adapters.base import Encoder, EncoderFacts, LoadRequest, Tokens, fingerprint_of
from rice_eval.adapters.checkpoints import Checkpoint, compare, few, open_checkpoint, refuse_nan, strip_wrappers
from rice_eval.adapters.cloc_model import ClocConfig, ClocModel
from rice_eval.adapters.hub import locate
from rice_eval.adapters.layouts import count_blocks
from rice_eval.adapters.patch_text import cloc_patches
from rice_eval.adapters.preprocessing import mean_and_std
from rice_eval.adapters.text import Words
from rice_eval.adapters.tower import fill, parameters_on_meta, shapes_of, unit
from rice_eval.errors import CheckpointError, PlanError, UsageError

__all__ = ["FORMAT", "ClocEncoder", "adapter", "config_of", "convert", "save"]

FORMAT = 1
BOXES_AT_ONCE = 32


def numbers_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Fields of the configuration that shapes tell; heads, activation, eps, temperature and eos_id are not among them.

    Raises:
        CheckpointError: a tensor that every CLOC file has is missing or of another rank; it is named.
    """
    seen = checkpoint.tensors

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in seen or len(seen[name].shape) != rank:
            raise CheckpointError(
                f"{checkpoint.path} (CLOC): key missing or of another rank ({name})",
                "see docs/encoders.md for the layout; rice-eval encoders convert --to cloc --names renames keys",
            )
        return seen[name].shape

    patch = shape("image.patch_embedding.weight", 4)
    positions = shape("image.position_embedding", 2)[0]
    side = round(positions**0.5)
    vocab, text_width = shape("text.token_embedding.weight", 2)
    return {
        "image_size": side * patch[2],
        "patch_size": patch[2],
        "width": patch[0],
        "depth": count_blocks(seen, "image.blocks."),
        "mlp": shape("image.blocks.0.fc1.weight", 2)[0],
        "embed_dim": shape("image.projection.weight", 2)[0],
        "text_width": text_width,
        "text_depth": count_blocks(seen, "text.blocks."),
        "text_mlp": shape("text.blocks.0.fc1.weight", 2)[0],
        "vocab_size": vocab,
        "context": shape("text.position_embedding", 2)[0],
        "prompter_mlp": shape("prompter.block.fc1.weight", 2)[0],
        "grounding_hidden": shape("grounding.fc1.weight", 2)[0],
    }


def config_of(checkpoint: Checkpoint) -> ClocConfig:
    """The configuration a file carries; header and ``config.json`` must agree with each other and with the tensors.

    Raises:
        CheckpointError: none, an impossible one, or one that disagrees.
    """
    path = checkpoint.path
    found: dict[str, dict[str, Any]] = {}
    if "cloc" in checkpoint.metadata:
        try:
            found["the header"] = json.loads(checkpoint.metadata["cloc"])
        except ValueError as error:
            raise CheckpointError(
                f"{path}: its header's 'cloc' field is no JSON ({error})", "write the file again"
            ) from error
    beside = checkpoint.config()
    if beside is not None and beside.get("model_type") == "cloc":
        found["config.json"] = {k: v for k, v in beside.items() if k not in ("model_type", "format")}
        if beside.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: config.json is of CLOC format {beside.get('format')}, known is {FORMAT}", "update rice-eval"
            )
    if not found:
        raise CheckpointError(
            f"{path}: no CLOC configuration in its header or beside it",
            "convert a plain state dict first: rice-eval encoders convert PATH --to cloc --out DIR",
        )
    parsed = {}
    for where, data in found.items():
        try:
            parsed[where] = ClocConfig.parse(data)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {where}: {error}", "see docs/encoders.md for the fields") from error
    values = list(parsed.values())
    if values[0] != values[-1]:
        key = next(k for k, v in asdict(values[0]).items() if asdict(values[-1])[k] != v)
        raise CheckpointError(
            f"{path}: config.json and the header disagree on {key}", "one of them was edited: write the file again"
        )
    told, where = asdict(values[0]), next(iter(parsed))
    for key, value in numbers_of(checkpoint).items():
        if told[key] != value:
            stem = {"depth": "image.blocks.", "text_depth": "text.blocks."}.get(key)
            lost = (
                f": {stem}{value}.norm1.weight and the rest of its block are missing"
                if stem and told[key] > value
                else ""
            )
            raise CheckpointError(
                f"{path}: {where} says {key} = {told[key]}, the tensors say {value}{lost}",
                "one belongs to another file",
            )
    return values[0]


def save(model: ClocModel, folder: Path) -> Path:
    """Write a model in the layout; files appear whole or not at all. Returns the weights' path."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    numbers = asdict(model.config)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    weights, config = folder / "model.safetensors", folder / "config.json"
    aside = {target: target.with_name(f"{target.name}.{os.getpid()}.writing") for target in (config, weights)}
    aside[config].write_text(json.dumps({"model_type": "cloc", "format": FORMAT, **numbers}, indent=2) + "\n")
    save_file(state, aside[weights], metadata={"format": "pt", "cloc": json.dumps(numbers, sort_keys=True)})
    for target, temporary in aside.items():
        os.replace(temporary, target)
    return weights


def convert(
    path: Path | str, out: Path, *, settings: Mapping[str, Any] | None = None, names: Mapping[str, str] | None = None
) -> Path:
    """A plain state dict of a CLOC model, written in the layout.

    Args:
        path: a file or folder; wrapper prefixes are taken off.
        out: the folder to write.
        settings: fields shapes do not tell (``heads``, ``text_heads``, ``act``, ``eps``, ``eos_id``, ``temperature``); heads default to 64 wide.
        names: regular expression -> replacement, applied in order to every name.

    Returns:
        The weights' path.

    Raises:
        CheckpointError: names or shapes that do not match after renaming, or settings that contradict shapes.
    """
    checkpoint = strip_wrappers(open_checkpoint(path))
    if names:
        try:
            renamed = {old: _rename(old, names) for old in checkpoint.tensors}
        except re.error as error:
            raise UsageError(f"--names: not a regular expression ({error})", "mend the file") from error
        if len(set(renamed.values())) != len(renamed):
            twice = [n for n in renamed.values() if list(renamed.values()).count(n) > 1]
            raise CheckpointError(
                f"{path}: --names gives several keys one name ({few(sorted(set(twice)))})", "mend the file"
            )
        checkpoint = checkpoint.renamed({new: old for old, new in renamed.items()}, "")
    numbers: dict[str, Any] = dict(numbers_of(checkpoint))
    numbers["heads"], numbers["text_heads"] = max(1, numbers["width"] // 64), max(1, numbers["text_width"] // 64)
    try:
        config = ClocConfig.parse({**numbers, **(settings or {})})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} (CLOC): {error}", "see docs/encoders.md for the fields") from error
    return save(_build(checkpoint, config), out)


def _rename(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def _build(checkpoint: Checkpoint, config: ClocConfig) -> ClocModel:
    with parameters_on_meta():
        model = ClocModel(config)
    want = shapes_of(model)
    compare(
        checkpoint.tensors,
        want,
        f"{checkpoint.path} (CLOC)",
        fix="see docs/encoders.md for the layout's names and shapes",
    )
    tensors = checkpoint.read(list(want))
    refuse_nan(tensors, f"{checkpoint.path} (CLOC)")
    fill(model, tensors)
    return model.eval()


def adapter(request: LoadRequest) -> ClocEncoder:
    """Load a CLOC model.

    Raises:
        CheckpointError: not in the layout, not whole, or its configuration disagrees.
    """
    checkpoint = strip_wrappers(open_checkpoint(locate(request)))
    config = config_of(checkpoint)
    model = _build(checkpoint, config)
    mean, std, notes = mean_and_std(checkpoint.folder, request.card, "clip")
    words = Words(checkpoint.folder, request, context=config.context, pad_to_context=True, lowercase=True)
    facts = EncoderFacts(
        name=request.card.name,
        family=request.family.family,
        arch=f"CLOC, {config.depth} blocks, width {config.width}, {config.heads} heads, Prompter",
        params=sum(p.numel() for p in model.image.parameters()),
        patch=config.patch_size,
        resolution=config.image_size,
        layers=config.depth,
        widths=(config.width,) * config.depth,
        strides=(config.patch_size,) * config.depth,
        mean=mean,
        std=std,
        abilities=("image", "regions") + (("text",) if words.available else ()),
        license=request.card.license or request.family.license,
        source=f"file {request.weights.name}" if request.weights else f"hub {request.card.source.hub}",
        notes=tuple(notes),
    )
    return ClocEncoder(facts, model, words)


class ClocEncoder(Encoder):
    """CLOC as an ``Encoder`` with a region head: f'(x) is the last block's tokens after the final norm."""

    def __init__(self, facts: EncoderFacts, model: ClocModel, words: Words) -> None:
        self._model, self._words = model, words
        self._mean = torch.tensor(facts.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(facts.std).view(1, 3, 1, 1)
        numbers = {"family": "cloc", **asdict(model.config), "mean": facts.mean, "std": facts.std}
        self.facts = replace(facts, sha256=fingerprint_of(model.state_dict(), numbers))

    def to(self, device: torch.device) -> ClocEncoder:
        """Move the weights; returns self."""
        self._model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        self.device = device
        return self

    def _compilable(self) -> Sequence[torch.nn.Module]:
        return list(self._model.image.blocks)

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        found = self._model.image.tokens((images - self._mean) / self._std, layers)
        if norm:
            found = {number: self._model.image.norm(tokens) for number, tokens in found.items()}
        patch = self.facts.patch
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        return Tokens(patches=found, grids=dict.fromkeys(found, grid))

    def embed_image(self, images: Tensor) -> Tensor:
        """``(B, E)`` L2-normalised: attention pooling of the normed last tokens, projected."""
        tokens = self.encode(images, layers=(-1,), norm=True).last
        with torch.inference_mode():
            return unit(self._model.image.projection(self._model.image.pool(tokens)))

    def embed_patches(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """See ``EmbedsPatches``: what the pooling gives for each patch alone."""
        found = self.encode(images, layers=(-1,), norm=True)
        with torch.inference_mode():
            return unit(cloc_patches(found.last, self._model.image)), found.grids[self.facts.layers]

    def embed_text(self, texts: list[str]) -> Tensor:
        """``(len(texts), E)`` L2-normalised; texts are lowered, as in the paper.

        Raises:
            CheckpointError: no tokenizer beside the weights, or one without the end-of-text token.
        """
        if not texts:
            return torch.empty(0, self._model.config.embed_dim, device=self.device)
        return self.embed_ids(self._words(texts)["input_ids"])

    def embed_ids(self, ids: Tensor) -> Tensor:
        """``(B, E)`` L2-normalised embeddings of ``(B, L)`` token ids.

        Raises:
            CheckpointError: a row without the end-of-text token.
        """
        eos = self._model.config.eos_id
        if not bool((ids == eos).any(dim=1).all()):
            raise CheckpointError(
                f"encoder '{self.name}': a text's tokens lack the end-of-text id {eos}",
                "put the tokenizer it was trained with beside the weights",
            )
        with torch.inference_mode():
            return unit(self._model.text(ids.to(self.device)))

    def region_features(self, tokens: Tokens, boxes: list[Tensor]) -> list[Tensor]:
        """The Prompter's features of boxes.

        Args:
            tokens: of ``encode(..., norm=True)`` with the last layer among them.
            boxes: for each image ``(n, 4)`` xyxy in units of the encoded image's sides, 0 to 1.

        Returns:
            For each image ``(n, E)``, L2-normalised.

        Raises:
            UsageError: another number of images, or boxes that are not in 0 to 1.
            PlanError: tokens without the last layer, or without the final norm.
        """
        image = self._last(tokens, len(boxes))
        out = []
        for row, wanted in zip(image, boxes, strict=True):
            if (
                wanted.ndim != 2
                or wanted.shape[1] != 4
                or (wanted.numel() and not bool(((wanted >= -1e-4) & (wanted <= 1 + 1e-4)).all()))
            ):
                raise UsageError(
                    f"region_features takes (n, 4) boxes in units of the image's sides, 0 to 1, not {tuple(wanted.shape)}",
                    "divide pixels by width and height",
                )
            prompts = self._model.prompter.boxes(wanted.to(row.device))
            out.append(unit(self._prompt(prompts, row)))
        return out

    def ground(self, tokens: Tokens, texts: list[list[str]]) -> list[Tensor]:
        """Boxes of texts: for each image ``(n, 4)`` xyxy in units of the encoded image's sides, as regressed (not clipped).

        Args:
            tokens: of ``encode(..., norm=True)`` with the last layer among them.
            texts: for each image its n texts.

        Raises:
            UsageError, PlanError, CheckpointError: see ``region_features`` and ``embed_text``.
        """
        return self.ground_embeddings(tokens, [self.embed_text(t) for t in texts])

    def ground_embeddings(self, tokens: Tokens, embeddings: list[Tensor]) -> list[Tensor]:
        """``ground`` for ``(n, E)`` L2-normalised text embeddings."""
        image = self._last(tokens, len(embeddings))
        out = []
        with torch.inference_mode():
            for row, texts in zip(image, embeddings, strict=True):
                z = self._prompt(self._model.prompter.texts(texts.to(row.device)), row)
                out.append(self._model.grounding(z))
        return out

    @torch.inference_mode()
    def _prompt(self, prompts: Tensor, row: Tensor) -> Tensor:
        starts = range(0, len(prompts), BOXES_AT_ONCE)
        parts = [self._model.prompter(prompts[s : s + BOXES_AT_ONCE], row) for s in starts]
        return torch.cat(parts) if parts else row.new_empty(0, self._model.config.embed_dim)

    def _last(self, tokens: Tokens, count: int) -> Tensor:
        if self.facts.layers not in tokens.patches:
            raise PlanError(
                f"encoder '{self.name}': the Prompter reads layer {self.facts.layers}, tokens hold {sorted(tokens.patches)}",
                "encode with layers=(-1,)",
            )
        if tokens.norm is False:
            raise PlanError(
                f"encoder '{self.name}': the Prompter reads tokens after the final norm", "encode with norm=True"
            )
        image = tokens.patches[self.facts.layers].to(self.device, torch.float32)
        if len(image) != count:
            raise UsageError(f"tokens of {len(image)} images, prompts of {count}", "give one list of prompts an image")
        return image
