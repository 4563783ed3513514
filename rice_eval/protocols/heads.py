"""Protocol ``head-import``: a published linear head evaluated as it is, the cheapest proof of the whole test path."""

from __future__ import annotations

import hashlib
import pickle
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rice_eval.adapters.base import EncoderFacts
from rice_eval.datasets.base import Annotation
from rice_eval.errors import CheckpointError
from rice_eval.protocols.base import Context, Head, Outcome, Protocol
from rice_eval.protocols.online import evaluate_online
from rice_eval.protocols.online_head import PixelHead
from rice_eval.protocols.online_infer import check_scales
from rice_eval.protocols.segmentation import LAYER_SETS, LayerSet, check_choice, layers_of

__all__ = ["HeadImport", "read_head"]

_NORM = re.compile(
    r"^(?:.*\.)?(?:bn|batchnorm_layer|norm)\.(weight|bias|running_mean|running_var|num_batches_tracked)$"
)
_CONV = re.compile(r"^(?:.*\.)?(?:conv_seg|conv)\.(weight|bias)$")


@dataclass(frozen=True)
class HeadImport(Protocol):
    """A batch norm and a 1x1 convolution read from a file; nothing is trained.

    Made for DINOv2's released heads (``decode_head.bn.*``, ``decode_head.conv_seg.*``); DINOv3's names
    (``batchnorm_layer.*``, ``conv.*``) and heads without a norm are read too. The file's content, not its name, is in the hash.

    Attributes:
        head: path of the file, safetensors or a pickle read with ``weights_only=True``.
        layer_set: layers that the head reads, concatenated.
        squeeze, scales, mirror: see ``OnlineLinear``.
    """

    id: ClassVar[str] = "head-import"
    kind: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"semantic"})
    metric: ClassVar[str] = "miou"
    distributed: ClassVar[bool] = True

    view: str = "short=512,slide=341,pad=patch,interp=plain"
    tokens: str = "online"
    head: str = ""
    layer_set: LayerSet = "last"
    squeeze: bool = True
    scales: tuple[float, ...] = (1.0,)
    mirror: bool = False
    _digest: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        check_choice("tokens", self.tokens, ("online",))
        check_scales(self.scales)
        if not self.head:
            raise ValueError("head is the path of a head's checkpoint")
        try:
            digest = hashlib.sha256(Path(self.head).read_bytes()).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{self.head}: can't be read ({error.strerror})", "check the head's path") from error
        object.__setattr__(self, "_digest", digest)

    def settings(self) -> dict[str, Any]:
        """Every field, with the sha256 of the head's file in place of its path."""
        plain = super().settings()
        plain["head"] = plain.pop("_digest")
        return plain

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set``."""
        return layers_of(self.layer_set, facts)

    def views(self) -> dict[str, tuple[str, ...]]:
        """None: nothing is read from the bank."""
        return {"train": (), "test": ()}

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``; the training split is not looked at."""
        layers = self.layers(context.facts)
        width = sum(context.facts.widths[layer - 1] for layer in layers)
        head = read_head(Path(self.head), width, len(context.test.classes)).to(context.device)
        start = time.perf_counter()
        scorer, forwards = evaluate_online(
            context, head, layers, self.norm, self.view, self.scales, self.mirror, self.squeeze, "fp32"
        )
        settings: dict[str, Any] = {"layers": list(layers), "head": self._digest[:16]}
        return Outcome(
            statistics=scorer.statistics(),
            chosen=settings,
            layers=layers,
            heads=(Head(settings, None),),
            seconds={"predict": time.perf_counter() - start},
            panels=tuple(scorer.panels),
            warnings=scorer.warnings(),
            predictions=scorer.predictions,
            forwards=forwards,
        )


def read_head(path: Path, width: int, classes: int) -> PixelHead:
    """A head from a file, in eval mode.

    Raises:
        CheckpointError: a file that can't be read, tensors that are no such head, or a head of another width or number of classes.
    """
    tensors = _tensors(path)
    norm: dict[str, Tensor] = {}
    conv: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        for pattern, found in ((_NORM, norm), (_CONV, conv)):
            match = pattern.match(name)
            if match:
                if match[1] in found:
                    raise CheckpointError(f"{path}: holds more than one head ('{name}')", "give a file with one")
                found[match[1]] = tensor
                break
        else:
            unknown.append(name)
    if (
        unknown
        or set(conv) != {"weight", "bias"}
        or (norm and not {"weight", "bias", "running_mean", "running_var"} <= set(norm))
    ):
        shown = ", ".join((unknown or sorted(tensors))[:3])
        raise CheckpointError(
            f"{path}: is no batch norm and 1x1 convolution (keys: {shown})", "head-import reads linear heads only"
        )
    weight = conv["weight"].reshape(conv["weight"].shape[0], -1, 1, 1)
    if (weight.shape[1], weight.shape[0]) != (width, classes):
        raise CheckpointError(
            f"{path}: a head from {weight.shape[1]} features to {weight.shape[0]} classes, here {width} features and {classes} classes",
            "choose the layer_set, the encoder and the dataset that the head was made for",
        )
    head = PixelHead(width, classes, bool(norm), 0.0, "normal", 0)
    head.conv.load_state_dict({"weight": weight.float(), "bias": conv["bias"].float()})
    if head.norm is not None:
        norm.setdefault("num_batches_tracked", torch.tensor(0))
        head.norm.load_state_dict({k: v if k == "num_batches_tracked" else v.float() for k, v in norm.items()})
    return head.eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: can't be read ({error})", "give safetensors, or a pickle of tensors alone"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{path}: holds no tensors by name", "give the state dict of a linear head")
    return dict(loaded)
