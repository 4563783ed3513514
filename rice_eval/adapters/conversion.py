"""Writing a checkpoint in another layout: the hub's, or CLOC's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rice_eval.adapters import clip, dual, dual_config, rice, siglip
from rice_eval.adapters import cloc as cloc_layout
from rice_eval.adapters.base import LoadRequest
from rice_eval.adapters.checkpoints import few, open_checkpoint
from rice_eval.adapters.layouts import load_tensors
from rice_eval.adapters.preprocessing import mean_and_std
from rice_eval.adapters.tower import build, core, shapes_of, transformers_module
from rice_eval.cards import EncoderCard, FamilyCard, SourceCard
from rice_eval.errors import CheckpointError, UsageError

__all__ = ["convert", "request_with"]

_SETTINGS = {
    "hf": ("act", "heads", "text_heads", "image_size"),
    "cloc": ("act", "heads", "text_heads", "eps", "eos_id", "temperature"),
}


def convert(
    path: str | Path,
    out: Path,
    to: str = "hf",
    *,
    settings: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> Path:
    """Write ``path`` in another layout, tensors bit for bit as stored.

    Args:
        path: a file, folder or glob.
        out: a folder that holds no weights yet.
        to: ``hf``: a folder both transformers 4.52.1+ and 5.x load (keys with ``vision_model.``); ``cloc``: CLOC's layout.
        settings: numbers that neither tensors nor config.json tell: ``act``, ``heads``, ``text_heads``, ``image_size``; for CLOC see there.
        names: for ``cloc`` only, see ``cloc.convert``.

    Returns:
        The weights' path.

    Raises:
        CheckpointError: not a family this can write, or not whole.
        UsageError: an unknown layout or setting, or a folder that holds weights already.
    """
    given = dict(settings or {})
    if to not in _SETTINGS:
        raise UsageError(f"--to {to}: no such layout", f"known: {', '.join(_SETTINGS)}")
    unknown = [k for k in given if k not in _SETTINGS[to]]
    if unknown:
        raise UsageError(f"--set {unknown[0]}: no such setting for --to {to}", f"known: {', '.join(_SETTINGS[to])}")
    if names and to != "cloc":
        raise UsageError("--names is for --to cloc", "leave it out")
    if out.is_dir() and (list(out.glob("*.safetensors")) or list(out.glob("*.bin"))):
        raise UsageError(f"--out {out}: holds weights already", "name another folder")
    if to == "cloc":
        return cloc_layout.convert(path, out, settings=given, names=names)
    checkpoint = open_checkpoint(path)
    found = rice.find(checkpoint)
    if found is not None:
        return _rice(found, out, given)
    tower = clip.find(checkpoint)
    if tower is not None:
        return _dual(tower, clip.SPEC, out, given)
    result = siglip.find(checkpoint)
    if result is not None:
        return _dual(result[0], result[1], out, given)
    raise CheckpointError(
        f"{checkpoint.path}: neither RICE, CLIP nor SigLIP (first keys: {few(list(checkpoint.tensors))})",
        "rice-eval encoders inspect says what it is",
    )


def request_with(options: Mapping[str, Any]) -> LoadRequest:
    """A request that carries settings in a card's place."""
    card = EncoderCard(
        name="converted", source=SourceCard(none=True), arch="as found", patch=1, resolution=1, options=dict(options)
    )
    return LoadRequest(card, FamilyCard(family="converted", title="converted", adapter="hf", encoders=(card,)))


def _rice(found: rice.Found, out: Path, given: dict[str, Any]) -> Path:
    config = rice.config_for(found)
    if "image_size" in given:
        config["image_size"] = int(given["image_size"])
    _, tensors = rice.tensors_for(found, config)
    metadata = {} if rice.POST_NORM[0] in tensors else {rice.ABSENT: "post_layernorm"}
    mean, std, _ = mean_and_std(found.checkpoint.folder, request_with({}).card, "clip")
    return _write(
        out,
        {f"vision_model.{n}": t for n, t in tensors.items()},
        {"architectures": ["MLCDVisionModel"], "model_type": "mlcd", **config},
        mean,
        std,
        config["image_size"],
        metadata,
    )


def _dual(found: dual_config.Found, spec: dual_config.Spec, out: Path, given: dict[str, Any]) -> Path:
    library = transformers_module(spec.label)
    options = {
        **given,
        **(
            {"width": found.numbers["hidden_size"], "depth": found.numbers["num_hidden_layers"]}
            if "heads" in given
            else {}
        ),
    }
    config, _ = dual_config.settings_of(found, spec, request_with(options), library)
    name = dual_config.class_of(found, spec)
    where = f"{found.checkpoint.path} ({spec.label}, {found.layout.name})"
    if found.outside and not any(c in found.prefix for c in dual.CONTAINERS):
        raise CheckpointError(
            f"{where}: {len(found.outside)} keys unexpected ({few(found.outside)})", "save the model's own state dict"
        )
    model = build(getattr(library, name), config, where)
    want = shapes_of(model if found.vision_at else core(model))
    tensors = load_tensors(
        found.checkpoint, found.layout, found.prefix, want, where, "rice-eval encoders inspect shows what it holds"
    )
    at = "" if found.vision_at else "vision_model."
    mean, std, _ = mean_and_std(found.checkpoint.folder, request_with({}).card, spec.stats)
    numbers = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
    size = found.numbers.get("image_size") or found.numbers["patch_size"] * dual_config.square_root(
        found.numbers["num_patches"], where
    )
    return _write(
        out, {at + n: t for n, t in tensors.items()}, {**numbers, "architectures": [name]}, mean, std, size, {}
    )


def _write(
    out: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    size: int,
    metadata: Mapping[str, str],
) -> Path:
    """Three files, each whole or absent; the weights last, so that a folder with weights is a finished one."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    # The processor squashes to the native square: no centre crop, which would lose the borders.
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": 3,
    }
    for name, value in (("config.json", config), ("preprocessor_config.json", processor)):
        aside = out / f"{name}.{os.getpid()}.writing"
        aside.write_text(json.dumps(value, indent=2, default=str) + "\n")
        os.replace(aside, out / name)
    weights = out / "model.safetensors"
    aside = out / f"model.safetensors.{os.getpid()}.writing"
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, aside, metadata={"format": "pt", **metadata})
    os.replace(aside, weights)
    return weights
