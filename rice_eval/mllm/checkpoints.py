"""Published multimodal checkpoints, taken apart into encoder, projector and language model.

=========================  ========================================================================================
``llava``                  LLaVA-1.5 in transformers' layout
``llava_next``             LLaVA-NeXT (1.6)
``llava_onevision``        LLaVA-OneVision
``llavaonevision1_5``      LLaVA-OneVision-1.5: RICE's tower and merger, Qwen3
=========================  ========================================================================================

The encoder goes through this package's own adapters (CLIP, SigLIP, MLCD and RICE), so that it is the encoder of every other
protocol. Every tensor of the file must find its place, and every place a tensor.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rice_eval.adapters import clip, rice, siglip
from rice_eval.adapters.base import Encoder, LoadRequest
from rice_eval.adapters.checkpoints import (
    Checkpoint,
    TensorInfo,
    compare,
    few,
    open_checkpoint,
    refuse_nan,
    strip_wrappers,
)
from rice_eval.adapters.hub import locate
from rice_eval.adapters.tower import build, first_line, parameters_on_meta, quiet, shapes_of, transformers_module
from rice_eval.cards import EncoderCard, FamilyCard, SourceCard
from rice_eval.errors import CheckpointError
from rice_eval.mllm.chat import Chat
from rice_eval.mllm.lm import LanguageModel, load_tokenizer
from rice_eval.mllm.memory import check_fits
from rice_eval.mllm.model import Mllm
from rice_eval.mllm.processor import chat_template, tiling_of
from rice_eval.mllm.projector import Projector
from rice_eval.mllm.scaling import Scaler
from rice_eval.mllm.sight import Sight

__all__ = ["KINDS", "load"]

KINDS = ("llava", "llava_next", "llava_onevision", "llavaonevision1_5")

# What names begin with -> part, and the beginning in the part's own names. transformers 4 and 5 differ, as do the models;
# the longest that fits counts.
_PLACES: dict[str, tuple[str, str]] = {
    "vision_tower.vision_model.": ("tower", ""),
    "vision_tower.": ("tower", ""),
    "model.vision_tower.vision_model.": ("tower", ""),
    "model.vision_tower.": ("tower", ""),
    "visual.merger.": ("projector", ""),
    "model.visual.merger.": ("projector", ""),
    "visual.": ("tower", ""),
    "model.visual.": ("tower", ""),
    "multi_modal_projector.": ("projector", ""),
    "model.multi_modal_projector.": ("projector", ""),
    "image_newline": ("newline", ""),
    "model.image_newline": ("newline", ""),
    "language_model.": ("lm", ""),
    "model.language_model.": ("lm", "model."),
    "lm_head.": ("lm", "lm_head."),
}
_PROJECTOR = {"linear_1.": "layers.0.", "linear_2.": "layers.2."}
_MERGER = {"ln_q.": "norm.", "mlp.0.": "layers.0.", "mlp.2.": "layers.2."}
_ADAPTERS: dict[str, Any] = {
    "clip_vision_model": clip.from_checkpoint,
    "siglip_vision_model": siglip.from_checkpoint,
    "mlcd": rice.from_checkpoint,
    "mlcd_vision_model": rice.from_checkpoint,
    "rice_vit": rice.from_checkpoint,
}


@dataclass
class _Inner(Checkpoint):
    """A part of a larger checkpoint, with the part of its configuration."""

    told: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The part's own configuration."""
        return self.told


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    scaler: Scaler = "torchvision",
) -> Mllm:
    """A published multimodal model.

    Args:
        path: a folder, or a hub id.
        dtype: of the language model; None for the type it is stored in. The encoder and projector run in float32.
        device: where it goes.
        scaler: ``torchvision``, as transformers 5 runs every such processor where torchvision is installed, or ``pil``, as
            LLaVA was trained and as transformers 4 runs them; a checkpoint's files do not tell which.

    Raises:
        CheckpointError: another kind of model, missing or unexpected tensors (the first are named), a processor that does
            something else.
        PlanError: it does not fit into memory.
    """
    library = transformers_module("a multimodal checkpoint")
    name = str(path)
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name}: the folder holds no model (no mllm.yaml, trained.json or config.json)",
            "give a trained probe's .files folder, or a LLaVA checkpoint as transformers saves it",
        )
    checkpoint = strip_wrappers(open_checkpoint(_find(name)), training_only=True)
    config = checkpoint.config()
    kind = str((config or {}).get("model_type", ""))
    if config is None or kind not in KINDS:
        raise CheckpointError(
            f"{name}: config.json says model_type = {kind or 'nothing'}",
            f"one of {', '.join(KINDS)} can be taken apart",
        )
    parts = _split(checkpoint, name)
    _check_memory(parts.get("lm", {}), checkpoint, dtype, device, name)
    settings = _settings(library, config, kind, name)
    if kind != "llavaonevision1_5" and "newline" not in parts and kind != "llava":
        raise CheckpointError(
            f"{name}: 1 keys missing (image_newline)", "the file is not whole: save or download it again"
        )
    if kind in ("llava", "llavaonevision1_5") and "newline" in parts:
        raise CheckpointError(
            f"{name}: 1 keys unexpected (image_newline)", "the file is of another kind than config.json"
        )
    encoder = _encoder(parts.get("tower", {}), checkpoint, settings, name)
    lm = _language_model(library, parts.get("lm", {}), checkpoint, settings, name, dtype)
    projector = _projector(parts.get("projector", {}), checkpoint, settings, encoder, lm, name)
    newline = None
    if "newline" in parts:
        newline = checkpoint.read(list(parts["newline"].values())).popitem()[1].float()
        if newline.shape != (lm.width,):
            raise CheckpointError(
                f"{name}: image_newline is {list(newline.shape)}, not [{lm.width}]", "the file is damaged"
            )
    tiling = tiling_of(checkpoint.folder, kind, settings.side, settings.pinpoints, settings.max_tiles, scaler)
    chat = Chat(
        lm.tokenizer,
        template=chat_template(checkpoint.folder),
        image_token=lm.tokenizer.convert_ids_to_tokens(settings.image_id),
        stops=lm.stops,
    )
    return Mllm(Sight(encoder, settings.layers, False, tiling), projector, lm, chat, newline).to(torch.device(device))


@dataclass(frozen=True)
class _Settings:
    kind: str
    vision: dict[str, Any]
    text: Any
    side: int
    layers: tuple[int, ...]
    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int | None
    image_id: int
    act: str
    bias: bool


def _settings(library: Any, config: dict[str, Any], kind: str, name: str) -> _Settings:
    """The numbers of config.json, with the defaults that transformers gives them.

    Raises:
        CheckpointError: numbers that do not fit, or a vision tower no adapter knows.
    """
    try:
        if kind == "llavaonevision1_5":
            vision = dict(config["vision_config"])
            inner = {**config["text_config"], "model_type": "qwen3"}
            text = library.Qwen3Config.from_dict(inner)
            text.tie_word_embeddings = bool(inner.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
            side = int(vision["patch_size"]) * int(vision.get("spatial_merge_size", 2))
            if int(vision.get("spatial_merge_size", 2)) != 2:
                raise ValueError(f"spatial_merge_size = {vision['spatial_merge_size']}, only 2 is known")
            vision.pop("model_type", None)
            return _Settings(kind, vision, text, side, (-1,), (), None, int(config["image_token_id"]), "gelu", True)
        with quiet(library):
            parsed = library.AutoConfig.for_model(kind).from_dict(config)
        vision = parsed.vision_config.to_dict()
        layers = parsed.vision_feature_layer
        pinpoints = tuple((int(h), int(w)) for h, w in getattr(parsed, "image_grid_pinpoints", None) or ())
        ratio = str(getattr(parsed, "vision_aspect_ratio", ""))
        settings = _Settings(
            kind,
            vision,
            parsed.text_config,
            int(vision["image_size"]),
            (layers,) if isinstance(layers, int) else tuple(layers),
            pinpoints,
            int(ratio.removeprefix("anyres_max_")) if ratio.startswith("anyres_max_") else None,
            int(parsed.image_token_id),
            str(parsed.projector_hidden_act),
            bool(parsed.multimodal_projector_bias),
        )
        if 0 in settings.layers:
            raise ValueError("vision_feature_layer = 0 is the embedding, no block")
        if parsed.vision_feature_select_strategy == "full" and vision["model_type"] != "siglip_vision_model":
            raise ValueError("vision_feature_select_strategy = full puts a class token among the patches")
    except CheckpointError:
        raise
    except Exception as error:  # transformers' validators raise kinds of their own, by version
        raise CheckpointError(f"{name}: config.json can't be used ({first_line(error)})", "mend config.json") from error
    if vision["model_type"] not in _ADAPTERS:
        raise CheckpointError(
            f"{name}: its vision tower is a {vision['model_type']}", f"towers known here: {', '.join(_ADAPTERS)}"
        )
    return settings


def _find(name: str) -> str | Path:
    if Path(name).expanduser().exists():
        return name
    return locate(_request(name))


def _request(name: str) -> LoadRequest:
    """The tower as an encoder of its own: named after the model, which is all that is known of it."""
    place = Path(name).expanduser()
    model = place.resolve().name if place.exists() else name.rsplit("/", 1)[-1]
    plain = re.sub(r"[^a-z0-9.\-]+", "-", model.lower()).strip("-.")
    card = EncoderCard(
        name=f"{plain}-tower" if plain else "tower",
        source=SourceCard.model_validate({"hub": name}),
        arch="as loaded",
        patch=1,
        resolution=1,
    )
    return LoadRequest(
        card,
        FamilyCard(family="mllm", title="tower of a multimodal model", adapter="mllm", encoders=(card,)),
        weights=place if place.exists() else None,
    )


def _split(checkpoint: Checkpoint, name: str) -> dict[str, dict[str, str]]:
    """Part -> its own names -> the file's. The tower keeps the file's names, which its adapter understands.

    Raises:
        CheckpointError: names that belong nowhere.
    """
    order = sorted(_PLACES, key=len, reverse=True)
    parts: dict[str, dict[str, str]] = {}
    strangers = []
    for key in checkpoint.tensors:
        begin = next((p for p in order if key.startswith(p)), None)
        if begin is None:
            strangers.append(key)
            continue
        part, stem = _PLACES[begin]
        own = key if part == "tower" else stem + key[len(begin) :]
        parts.setdefault(part, {})[own] = key
    if strangers:
        raise CheckpointError(
            f"{name}: {len(strangers)} keys unexpected ({few(strangers)})",
            "save the model with transformers' save_pretrained",
        )
    return parts


def _encoder(names: Mapping[str, str], checkpoint: Checkpoint, settings: _Settings, name: str) -> Encoder:
    if not names:
        raise CheckpointError(f"{name}: holds no vision tower", "save the whole model")
    inner = checkpoint.renamed(names, "")
    part = _Inner(
        checkpoint.path,
        checkpoint.folder,
        inner.tensors,
        inner.metadata,
        "",
        inner._files,
        inner._loaded,
        inner._inner,
        told=settings.vision,
    )
    encoder: Encoder = _ADAPTERS[settings.vision.get("model_type", "rice_vit")](part, _request(name))
    return encoder


def _stored_as(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """The one type they are stored in; float32 where there are several."""
    kinds = {i.dtype for i in tensors.values()}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _check_memory(
    names: Mapping[str, str], checkpoint: Checkpoint, dtype: torch.dtype | None, device: str, name: str
) -> None:
    """By the file's own list of tensors, before any is read.

    Raises:
        PlanError: the language model does not fit.
    """
    found = {k: checkpoint.tensors[v] for k, v in names.items() if not k.endswith(".inv_freq")}
    count = sum(math.prod(i.shape) for i in found.values())
    check_fits(count, dtype or _stored_as(found), torch.device(device), name)


def _language_model(
    library: Any,
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    settings: _Settings,
    name: str,
    dtype: torch.dtype | None,
) -> LanguageModel:
    text = settings.text
    found = checkpoint.renamed(names, "").tensors
    if text.tie_word_embeddings or "lm_head.weight" not in found:
        text.tie_word_embeddings = "lm_head.weight" not in found
    classes = library.AutoModelForCausalLM._model_mapping
    if type(text) not in classes:
        raise CheckpointError(
            f"{name}: its language model is a {text.model_type}, which has no causal class", "choose another"
        )
    model = build(classes[type(text)], text, f"{name} (language model)")
    want = shapes_of(model)
    if text.tie_word_embeddings:
        want.pop("lm_head.weight", None)
    have = {k: i for k, i in found.items() if not k.endswith(".inv_freq")}
    _compare(have, want, names, f"{name} (language model)")
    kept = dtype or _stored_as(have)
    raw = checkpoint.read([names[k] for k in want])
    refuse_nan(raw, name)
    model.load_state_dict({k: raw[names[k]].to(kept) for k in want}, strict=False, assign=True)
    if text.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    left = [n for n, p in model.named_parameters() if p.is_meta]
    if left:
        raise CheckpointError(
            f"{name}: no tensor was given for {left[0]}", "this is a bug: report it with the model's name"
        )
    tokenizer = load_tokenizer(checkpoint.folder, name)
    return LanguageModel(name, model, tokenizer, f"checkpoint {checkpoint.path.name}")


def _projector(
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    settings: _Settings,
    encoder: Encoder,
    lm: LanguageModel,
    name: str,
) -> Projector:
    table = _MERGER if settings.kind == "llavaonevision1_5" else _PROJECTOR
    width = sum(encoder.facts.widths[encoder.resolve_layers([n])[0] - 1] for n in settings.layers)
    shapes = {k: checkpoint.tensors[v].shape for k, v in names.items()}
    first = shapes.get("mlp.0.weight" if table is _MERGER else "linear_1.weight")
    with parameters_on_meta():
        if table is _MERGER:
            eps = float(settings.vision.get("layer_norm_eps", 1e-5))
            module = Projector("2x2-merge", width, lm.width, hidden=first[0] if first else None, eps=eps)
        else:
            hidden = first[0] if first else lm.width
            module = Projector("mlp2x_gelu", width, lm.width, hidden=hidden, bias=settings.bias, act=settings.act)
    back = {ours: theirs for theirs, ours in table.items()}
    want = {}
    for key, shape in shapes_of(module).items():
        stem = next(s for s in back if key.startswith(s))
        want[back[stem] + key[len(stem) :]] = shape
    have = {k: checkpoint.tensors[v] for k, v in names.items()}
    _compare(have, want, names, f"{name} (projector)")
    raw = checkpoint.read(list(names.values()))
    refuse_nan(raw, name)
    given: dict[str, Tensor] = {}
    for key, tensor in ((k, raw[v]) for k, v in names.items()):
        stem = next(s for s in table if key.startswith(s))
        given[table[stem] + key[len(stem) :]] = tensor.float()
    module.load_state_dict(given, assign=True)
    return module.requires_grad_(False)


def _compare(
    have: Mapping[str, TensorInfo], want: Mapping[str, tuple[int, ...]], names: Mapping[str, str], where: str
) -> None:
    """``compare`` in the file's own names; those of missing tensors are told from their neighbours'."""
    known = dict(names)
    for key in want:
        near = max(names, key=lambda k: len(os.path.commonprefix([k, key])), default=key)
        shared = len(os.path.commonprefix([near, key]))
        known.setdefault(key, names.get(near, near)[: len(names.get(near, near)) - len(near) + shared] + key[shared:])
    compare(
        {known[k]: i for k, i in have.items()},
        {known[k]: s for k, s in want.items()},
        where,
        fix="the file is not whole, or config.json is another model's",
    )
