"""Any ViT-like vision model that ``transformers`` knows: ``hf:REPOSITORY`` or ``hf:FOLDER``.

Weights are read by this package's own reader and handed to the library, which knows the renamings between its versions; its
loading report must then be empty. How the model is laid out (blocks, final norm, leading tokens) is found by looking and
proved by one small forward, and a model whose proof fails is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rice_eval.adapters.base import EncoderFacts, LoadRequest
from rice_eval.adapters.checkpoints import (
    Checkpoint,
    few,
    open_checkpoint,
    read_json,
    refuse_nan,
    strip_wrappers,
    unusable,
)
from rice_eval.adapters.hub import locate
from rice_eval.adapters.preprocessing import mean_and_std
from rice_eval.adapters.tower import Tower, first_line, quiet, transformers_module
from rice_eval.errors import CheckpointError, PlanError

__all__ = ["adapter"]

_FAMILIES = {
    "mlcd": "rice",
    "mlcd_vision_model": "rice",
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip2": "siglip",
    "siglip2_vision_model": "siglip",
}
_NORMS = ("layernorm", "norm", "rms_norm", "post_layernorm", "layer_norm", "final_layernorm")
#: Heads that a checkpoint may carry and dense features never pass through.
_HEADS = ("pooler.", "classifier.", "decoder.", "lm_head.", "cls_classifier.", "distillation_classifier.", "mask_token")


@dataclass(frozen=True)
class _Parts:
    blocks: nn.ModuleList
    norm: nn.Module | None
    cls: int
    registers: int


def adapter(request: LoadRequest) -> Tower:
    """Load a vision model by transformers' own class.

    Raises:
        CheckpointError: no config.json, a model type that is no ViT, keys that do not match, code that may not run.
    """
    own = locate(LoadRequest(request.card, request.family)) if request.card.source.hub else None
    place = request.weights if request.weights is not None else own
    checkpoint = strip_wrappers(open_checkpoint(place if place is not None else locate(request)), training_only=True)
    folder = checkpoint.folder
    data = checkpoint.config()
    if data is None and own is not None:  # --weights FILE: the numbers are the named repository's
        folder = open_checkpoint(own).folder
        data = read_json(folder / "config.json")
    if data is None:
        raise CheckpointError(
            f"{checkpoint.path}: no config.json beside the weights", "hf: needs a folder that save_pretrained wrote"
        )
    kind = str(data.get("model_type", ""))
    if kind in _FAMILIES:
        return _delegate(kind, request)
    library = transformers_module(f"hf:{request.card.source.hub}")
    remote = "auto_map" in data
    if remote and not request.trust_remote_code and kind not in library.CONFIG_MAPPING:
        raise CheckpointError(
            f"{checkpoint.path}: its model_type '{kind}' runs on code shipped with the checkpoint",
            "read that code, then pass --trust-remote-code",
        )
    try:
        config = library.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=remote and request.trust_remote_code
        )
    except Exception as error:  # transformers' validators raise kinds of their own, by version
        raise CheckpointError(
            f"{folder}: config.json is not one this transformers ({library.__version__}) knows ({first_line(error)})",
            "install a newer transformers, or check the folder",
        ) from error
    config.output_attentions = config.output_hidden_states = False
    if kind == "vit_mae":
        config.mask_ratio = 0.0  # every patch is encoded; the reference's default hides three quarters of them
    model, notes = _model(library, config, checkpoint, folder, request, remote)
    vision = getattr(model, "vision_model", model)
    return _tower(vision, config, data, checkpoint, folder, request, notes)


def _delegate(kind: str, request: LoadRequest) -> Tower:
    """Families with a reader of their own are read by it; the card's numbers come from the checkpoint."""
    if _FAMILIES[kind] == "rice":
        from rice_eval.adapters.rice import adapter as rice

        return rice(request)
    if _FAMILIES[kind] == "clip":
        from rice_eval.adapters.clip import adapter as clip

        return clip(request)
    from rice_eval.adapters.siglip import adapter as siglip

    return siglip(request)


def _model(
    library: Any, config: Any, checkpoint: Checkpoint, folder: Any, request: LoadRequest, remote: bool
) -> tuple[Any, list[str]]:
    where = f"{checkpoint.path} ({config.model_type})"
    options: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32}
    try:
        if remote and request.trust_remote_code:
            with quiet(library):
                loaded, info = library.AutoModel.from_pretrained(
                    str(folder), trust_remote_code=True, local_files_only=True, **options
                )
        else:
            cls = library.MODEL_MAPPING[type(config)]
            if "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
                options["add_pooling_layer"] = False
            if getattr(cls, "_supports_sdpa", False):
                options["attn_implementation"] = "sdpa"
            tensors = checkpoint.read(list(checkpoint.tensors))
            types = unusable(checkpoint.tensors, list(tensors))
            if types:
                raise CheckpointError(
                    f"{where}: {len(types)} tensors are not bf16, fp16 or fp32 ({few(types)})", "save plain weights"
                )
            refuse_nan(tensors, where)
            options["ignore_mismatched_sizes"] = True  # named below and refused
            with quiet(library):
                loaded, info = cls.from_pretrained(None, config=config, state_dict=tensors, **options)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"{where}: transformers has no bare model of this type", "use an encoder, not a task model"
        ) from error
    except Exception as error:  # the library's validators, its modules and code shipped with a checkpoint
        raise CheckpointError(
            f"{where}: can't be loaded ({' '.join(str(error).split())[:300]})", "check the folder"
        ) from error
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("pooler."))
    strangers = sorted(k for k in info["unexpected_keys"] if not any(head in k for head in _HEADS))
    wrong = sorted(str(m[0] if isinstance(m, tuple) else m) for m in info.get("mismatched_keys", ()))
    problems = [
        f"{len(keys)} {what} ({few(keys)})"
        for what, keys in (("keys missing", missing), ("keys unexpected", strangers), ("shapes differ", wrong))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{where}: " + ", ".join(problems), "the file is not whole or of another model type")
    left = sorted(k for k in info["unexpected_keys"])
    kinds = sorted({str(i.dtype)[6:] for i in checkpoint.tensors.values() if i.dtype.is_floating_point})
    notes = [f"heads left out: {few(left)}"] if left else []
    if kinds != ["float32"]:
        notes.append(f"stored as {', '.join(kinds)}, run as float32")
    if checkpoint.stripped:
        notes.append(f"prefix '{checkpoint.stripped}' taken off every key")
    return loaded.eval().requires_grad_(False), notes


def _parts(vision: nn.Module, where: str) -> tuple[nn.ModuleList, nn.Module | None]:
    lists = [m for m in vision.modules() if isinstance(m, nn.ModuleList) and len(m) and len({type(b) for b in m}) == 1]
    if not lists:
        raise CheckpointError(f"{where}: has no list of equal blocks", "hf: reads ViT-like models only")
    blocks = max(lists, key=len)
    norm = next((m for n in _NORMS if isinstance(m := getattr(vision, n, None), nn.Module)), None)
    return blocks, norm


def _caller(vision: nn.Module, kind: str, patch: int) -> Callable[[Tensor], Any]:
    accepted = inspect.signature(vision.forward).parameters
    extra: dict[str, Any] = {}
    if "interpolate_pos_encoding" in accepted:
        extra["interpolate_pos_encoding"] = True

    def call(pixels: Tensor) -> Any:
        more: dict[str, Any] = {}
        if kind == "vit_mae":  # the reference shuffles patches by this noise; rising noise keeps raster order
            count = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
            more["noise"] = torch.arange(count, device=pixels.device, dtype=torch.float32).expand(pixels.shape[0], -1)
        try:
            return vision(pixel_values=pixels, **extra, **more)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size of tensor" not in str(error):
                raise
            raise PlanError(
                f"a {kind} model can't take {pixels.shape[-2]} x {pixels.shape[-1]} px ({first_line(error)})",
                "choose a view of its native size",
            ) from error

    return call


def _prove(vision: nn.Module, run: Callable[[Tensor], Any], patch: int, native: int, where: str) -> _Parts:
    """One forward: the last block's output, normed or not, must be the model's, and the rest of the tokens a grid."""
    blocks, norm = _parts(vision, where)
    caught: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(
        lambda _m, _i, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    grid = (2, 3)
    try:
        with torch.inference_mode():
            pixels = torch.linspace(-1, 1, 3 * 6 * patch * patch).view(1, 3, 2 * patch, 3 * patch)
            try:
                out = run(pixels)
            except PlanError:
                grid = (native // patch, native // patch)
                out = run(torch.zeros(1, 3, native, native))
            last = out.last_hidden_state
            normed = norm(caught[-1]) if norm is not None else caught[-1]
    except (RuntimeError, TypeError, AttributeError, IndexError, PlanError) as error:
        raise CheckpointError(
            f"{where}: a small forward failed ({first_line(error)})", "hf: reads ViT-like models only"
        ) from error
    finally:
        handle.remove()
    same = any(last.shape == t.shape and torch.allclose(last, t, atol=1e-5) for t in (normed, caught[-1]))
    leading = last.shape[1] - grid[0] * grid[1] if last.ndim == 3 else -1
    if not same or leading < 0:
        raise CheckpointError(
            f"{where}: its output is not its last block's tokens with a final norm",
            "hf: reads ViT-like models only; write an adapter with file:",
        )
    holders = (vision, getattr(vision, "embeddings", vision))
    n_cls = int(
        leading > 0
        and any(
            isinstance(getattr(h, n, None), Tensor)
            for h in holders
            for n in ("cls_token", "class_token", "class_embedding")
        )
    )
    return _Parts(blocks, norm, n_cls, leading - n_cls)


def _tower(
    vision: nn.Module,
    config: Any,
    data: Mapping[str, Any],
    checkpoint: Checkpoint,
    folder: Any,
    request: LoadRequest,
    notes: list[str],
) -> Tower:
    kind = str(data["model_type"])
    where = f"{checkpoint.path} ({kind})"
    inner = getattr(config, "vision_config", config)
    patch, native = getattr(inner, "patch_size", None), getattr(inner, "image_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    native = native[0] if isinstance(native, list | tuple) else native
    if not isinstance(patch, int) or not isinstance(native, int):
        raise CheckpointError(
            f"{where}: config.json has no patch_size and image_size", "hf: reads ViT-like models only"
        )
    run = _caller(vision, kind, patch)
    parts = _prove(vision, run, patch, native - native % patch, where)
    mean, std, said = mean_and_std(folder, request.card, "imagenet")
    width, depth = int(inner.hidden_size), len(parts.blocks)
    source = request.card.source
    facts = EncoderFacts(
        name=request.card.name,
        family=request.family.family,
        arch=f"{type(vision).__name__}, {depth} blocks, width {width}",
        params=0,
        patch=patch,
        resolution=native,
        layers=depth,
        widths=(width,) * depth,
        strides=(patch,) * depth,
        mean=mean,
        std=std,
        license=request.card.license or request.family.license,
        source=f"file {request.weights.name}"
        if request.weights
        else f"hub {source.hub}" + (f" at {source.revision}" if source.revision else ""),
        notes=(*notes, *said),
    )
    return Tower(
        facts,
        model=vision,
        vision=vision,
        blocks=list(parts.blocks),
        final_norm=parts.norm,
        leading=(parts.cls, parts.registers),
        run=run,
        architecture={"family": kind, **_numbers(data)},
        identity=checkpoint.read([n for n in checkpoint.tensors if not any(head in n for head in _HEADS)]),
    )


def _numbers(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json less what only says where it came from."""
    skip = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "text_config")
    return {k: _numbers(v) if isinstance(v, dict) else v for k, v in data.items() if k not in skip}
