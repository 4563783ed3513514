"""CLIP's and SigLIP's kind of model in numbers: what is in a file, and the configuration it must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rice_eval.adapters.base import LoadRequest
from rice_eval.adapters.checkpoints import Checkpoint, TensorInfo
from rice_eval.adapters.layouts import Layout, count_blocks
from rice_eval.adapters.tower import first_line
from rice_eval.errors import CheckpointError

__all__ = ["Found", "Spec", "check_channels", "check_numbers", "class_of", "settings_of", "square_root", "text_numbers"]


@dataclass(frozen=True)
class Spec:
    """What tells one family from another.

    Attributes:
        label: the family in messages.
        full, projected, vision: transformers' classes for image and text, image with projection, image alone.
        full_config, vision_config: their configuration classes.
        cls_tokens: class tokens before the patches.
        stats: usual mean and std.
        pad_to_context: see ``Words``.
    """

    label: str
    full: str
    projected: str | None
    vision: str
    full_config: str
    vision_config: str
    cls_tokens: int
    stats: Literal["clip", "half"]
    pad_to_context: bool


@dataclass(frozen=True)
class Found:
    """A tower inside a checkpoint; names as in ``rice.Found``.

    Attributes:
        numbers: fields of the vision configuration read from shapes.
        text: fields of the text configuration read from shapes; None where there is no text tower.
        projection: width of the common space; None where there is no projection.
        vision_at: what the vision part's names begin with in transformers' full model, ``vision_model.``; empty for a bare tower.
    """

    checkpoint: Checkpoint
    layout: Layout
    prefix: str
    vision_at: str
    numbers: dict[str, Any]
    text: dict[str, int] | None
    projection: int | None
    outside: tuple[str, ...] = field(default=())


def square_root(count: int, what: str) -> int:
    """The side of a square grid of ``count`` positions.

    Raises:
        CheckpointError: ``count`` is no square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise CheckpointError(
            f"{what}: {count} positions are no square grid", "the file is damaged or of another family"
        )
    return side


def check_channels(channels: int, where: str) -> None:
    """Images have three.

    Raises:
        CheckpointError: the patch embedding takes another number.
    """
    if channels != 3:
        raise CheckpointError(f"{where}: the patch embedding takes {channels} channels", "only RGB towers can be run")


def text_numbers(seen: Mapping[str, TensorInfo]) -> dict[str, int] | None:
    """Fields of the text configuration, from transformers' names and shapes."""
    try:
        vocab, width = seen["text_model.embeddings.token_embedding.weight"].shape
        numbers = {
            "vocab_size": vocab,
            "hidden_size": width,
            "max_position_embeddings": seen["text_model.embeddings.position_embedding.weight"].shape[0],
            "num_hidden_layers": count_blocks(seen, "text_model.encoder.layers."),
            "intermediate_size": seen["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        }
    except (KeyError, ValueError):
        return None
    head = seen.get("text_model.head.weight")  # SigLIP: the giant's image tower is wider than its text tower
    if head is not None and len(head.shape) == 2:
        numbers["projection_size"] = head.shape[0]
    return numbers


def check_numbers(
    told: Mapping[str, Any], numbers: Mapping[str, Any], where: str, missing: Callable[[int], str]
) -> None:
    """config.json's numbers must be the tensors'.

    Args:
        told: config.json's fields.
        numbers: the same fields read from shapes.
        where: file and part of it.
        missing: the first key of block ``n`` in the file's own names, for a tower with blocks cut off.

    Raises:
        CheckpointError: they differ.
    """
    for key, value in numbers.items():
        if (
            key == "image_size"
            and isinstance(told.get(key), int)
            and told[key] // numbers["patch_size"] == value // numbers["patch_size"]
        ):
            continue  # SigLIP at 384 px with patches of 14: 27 patches a side, 378 px, the rest cut off upstream
        if key in told and told[key] != value:
            lost = ""
            if key == "num_hidden_layers" and isinstance(told[key], int) and told[key] > value:
                lost = f": {missing(value)} and the rest of its block are missing"
            raise CheckpointError(
                f"{where}: config.json says {key} = {told[key]}, the tensors say {value}{lost}",
                "one of the two belongs to another checkpoint",
            )


def settings_of(found: Found, spec: Spec, request: LoadRequest, library: Any) -> tuple[Any, list[str]]:
    """transformers' configuration object and what was assumed for it."""
    path, checkpoint = found.checkpoint.path, found.checkpoint
    config = checkpoint.config()
    where = f"{path} ({spec.label})"

    def key_of(stem: str) -> Callable[[int], str]:
        return lambda n: found.prefix + found.layout.source(f"{stem}{n}.layer_norm1.weight")[0]

    vision_key = key_of(f"{found.vision_at}encoder.layers.")
    if config is not None and not found.outside:
        inner = config.get("vision_config")
        told = inner if isinstance(inner, dict) else config
        full = getattr(library, spec.full_config)
        try:
            if isinstance(inner, dict):
                parsed = full.from_dict(config)
                vision = parsed.vision_config
            else:
                parsed = vision = getattr(library, spec.vision_config).from_dict(config)
        except Exception as error:  # transformers' validators raise kinds of their own, by version
            raise CheckpointError(
                f"{path}: config.json does not fit {spec.label} ({first_line(error)})", "mend config.json"
            ) from error
        kind = str(config.get("model_type", ""))
        known = {full.model_type, getattr(library, spec.vision_config).model_type}
        if kind and kind not in known:
            raise CheckpointError(
                f"{path}: config.json says model_type = {kind}, the tensors are {spec.label}'s",
                f"one of {', '.join(sorted(known))} is meant, or the two belong to different checkpoints",
            )
        check_numbers({**vision.to_dict(), **told}, found.numbers, where, vision_key)
        if found.text is not None and isinstance(inner, dict):
            check_numbers(
                parsed.text_config.to_dict(), found.text, f"{where}, text tower", key_of("text_model.encoder.layers.")
            )
        projection = getattr(parsed, "projection_dim", None)
        if found.projection is not None and projection is not None and projection != found.projection:
            raise CheckpointError(
                f"{where}: config.json says projection_dim = {projection}, the tensors say {found.projection}",
                "one of the two belongs to another checkpoint",
            )
        if found.text is not None and not isinstance(inner, dict):
            raise CheckpointError(
                f"{where}: holds a text tower, config.json describes an image tower alone",
                "put the full config.json beside it",
            )
        if found.text is None and isinstance(inner, dict):
            if found.projection is not None:
                vision.projection_dim = found.projection
            parsed = vision
        return parsed, []
    return _from_card(found, spec, request, library, vision_key)


def _from_card(
    found: Found, spec: Spec, request: LoadRequest, library: Any, vision_key: Callable[[int], str]
) -> tuple[Any, list[str]]:
    """Without a config.json: what shapes do not tell comes from the card, or is an error."""
    options, numbers = request.card.options, dict(found.numbers)
    where = f"{found.checkpoint.path} ({spec.label}, no config.json)"
    if "act" not in options:
        raise CheckpointError(
            f"{where}: the activation can't be read from tensors and the card does not say it",
            "put a config.json beside the file",
        )
    same_width = numbers["hidden_size"] == options.get("width")
    if same_width and numbers["num_hidden_layers"] != options["depth"]:
        raise CheckpointError(
            f"{where}: holds {numbers['num_hidden_layers']} blocks where {request.card.arch} has {options['depth']} "
            f"(first missing key {vision_key(numbers['num_hidden_layers'])})",
            "put a config.json beside it if the depth is meant",
        )
    notes = []
    if same_width:
        numbers["num_attention_heads"] = options["heads"]
    else:
        # openai/CLIP, model.py build_model: heads are 64 wide.
        numbers["num_attention_heads"] = max(1, numbers["hidden_size"] // 64)
        notes.append(f"no config.json: heads taken as width / 64 = {numbers['num_attention_heads']}")
    numbers["hidden_act"] = options["act"]
    if found.text is None:
        if found.projection is not None:
            numbers["projection_dim"] = found.projection
        return getattr(library, spec.vision_config)(**numbers), notes
    expected = options.get("text_depth", found.text["num_hidden_layers"])
    if same_width and found.text["num_hidden_layers"] != expected:
        first = found.layout.source(f"text_model.encoder.layers.{found.text['num_hidden_layers']}.layer_norm1.weight")[
            0
        ]
        raise CheckpointError(
            f"{where}: the text tower has {found.text['num_hidden_layers']} blocks where {request.card.name}'s has "
            f"{expected} (first missing key {found.prefix}{first})",
            "put a config.json beside it if the depth is meant",
        )
    text_heads = options.get("text_heads") if same_width else None
    if text_heads is None:
        text_heads = max(1, found.text["hidden_size"] // 64)
        notes.append(f"no config.json: heads of the text tower taken as width / 64 = {text_heads}")
    text = {
        **found.text,
        "num_attention_heads": text_heads,
        "hidden_act": options["act"],
        "eos_token_id": found.text["vocab_size"]
        - 1,  # the end of text is the highest id, which openai/CLIP finds by argmax
        "bos_token_id": found.text["vocab_size"] - 2,
    }
    full = {"vision_config": numbers, "text_config": text}
    if found.projection is not None:
        full["projection_dim"] = found.projection  # type: ignore[assignment]
    return getattr(library, spec.full_config)(**full), notes


def class_of(found: Found, spec: Spec) -> str:
    """The transformers class that holds what the file holds."""
    if found.text is not None:
        return spec.full
    return spec.projected if found.projection is not None and spec.projected else spec.vision
