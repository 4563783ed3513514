"""A plain ONNX file: one image input, and outputs that are maps ``(B, D, h, w)`` or tokens ``(B, N, D)``, each a layer.

Options of a card: ``outputs`` (names, in the order of the layers; all that fit otherwise), ``prefix`` (tokens before the
patches, the first of them the class token; inferred from a square input otherwise).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rice_eval.adapters.base import Encoder, EncoderFacts, LoadRequest, Tokens, fingerprint_of
from rice_eval.adapters.blocks import IMAGENET_MEAN, IMAGENET_STD, flatten_map, split_tokens
from rice_eval.errors import CardError, CheckpointError, MissingExtraError, NotFoundError, PlanError, UsageError

__all__ = ["OnnxEncoder", "adapter"]

# More tokens than this before the patches are no class token and registers (DINOv3 has 5, C-RADIOv4 has 10).
_MOST_PREFIX = 16


class OnnxEncoder(Encoder):
    """An ONNX file run by onnxruntime.

    Args:
        path: the file.
        facts: what a record says of it.
        outputs: names of the outputs, one a layer.
        prefixes: tokens before the patches, one number a layer; None for a map.
        fixed: ``(H, W)`` where the file takes one size only.
        one: whether the file takes one image at a time.
    """

    def __init__(
        self,
        path: Path,
        facts: EncoderFacts,
        outputs: Sequence[str],
        prefixes: Sequence[int | None],
        fixed: tuple[int, int] | None,
        one: bool,
    ) -> None:
        self.facts = facts
        self._path, self._outputs, self._prefixes, self._fixed, self._one = path, outputs, prefixes, fixed, one
        self._session = _session(path, "CPUExecutionProvider")
        self._mean = torch.tensor(facts.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(facts.std).view(1, 3, 1, 1)

    def check_size(self, height: int, width: int) -> None:
        """As for every encoder; a file exported for one size takes that size alone."""
        if self._fixed is not None and (height, width) != self._fixed:
            h, w = self._fixed
            raise PlanError(
                f"encoder '{self.name}' was exported for {h} x {w} px, not {height} x {width}",
                f"choose the view square={h}" if h == w else "export it with dynamic sides",
            )
        if self._fixed is None:
            super().check_size(height, width)

    def to(self, device: torch.device) -> OnnxEncoder:
        """Run on another device; onnxruntime needs its CUDA build for a GPU."""
        import onnxruntime

        if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UsageError("this onnxruntime can't use CUDA", "pip install onnxruntime-gpu, or use --device cpu")
        if device.type != self.device.type:
            self._session = _session(
                self._path, "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
            )
        self.device = device
        return self

    def _run(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        feed = self._session.get_inputs()[0].name
        groups = torch.split(x, 1) if self._one else (x,)
        runs = [self._session.run(list(names), {feed: group.contiguous().numpy()}) for group in groups]
        return [torch.from_numpy(_joined(parts)) for parts in zip(*runs)]

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        x = (images.cpu().float() - self._mean) / self._std
        patches, grids, cls, registers = {}, {}, None, None
        for layer, out in zip(layers, self._run(x, [self._outputs[layer - 1] for layer in layers])):
            out = out.to(self.device)
            prefix, stride = self._prefixes[layer - 1], self.facts.strides[layer - 1]
            if prefix is None:
                patches[layer], grids[layer] = flatten_map(out)
                continue
            patches[layer], cls, registers = split_tokens(out, min(prefix, 1), max(prefix - 1, 0))
            grids[layer] = (images.shape[-2] // stride, images.shape[-1] // stride)
        return Tokens(patches, grids, cls, registers)


def _joined(parts: Sequence[Any]) -> Any:
    import numpy as np

    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _session(path: Path, provider: str) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), providers=[provider])
    except Exception as error:  # onnxruntime raises kinds of its own
        raise CheckpointError(f"{path}: onnxruntime can't load it ({error})"[:400], "export it again") from error


def _tokens_layout(n: int, side: int) -> tuple[int, int] | None:
    """``(prefix, grid side)`` of N tokens of a square image: the largest grid that divides the side and leaves few tokens."""
    for grid in range(math.isqrt(n), 0, -1):
        prefix = n - grid * grid
        if prefix > _MOST_PREFIX:
            return None
        if side % grid == 0:
            return prefix, grid
    return None


def _weights(path: Path) -> tuple[int, str]:
    """Parameters and fingerprint: the initialisers by name, and the graph without them."""
    import onnx
    from onnx import numpy_helper

    try:
        model = onnx.load(str(path))
        tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    except Exception as error:  # protobuf and onnx raise kinds of their own
        raise CheckpointError(f"{path}: is no readable ONNX file ({error})"[:400], "export it again") from error
    params = sum(int(t.size) for t in tensors.values() if t.dtype.kind == "f")
    hashes = {
        name: hashlib.sha256(f"{t.dtype}{t.shape}".encode() + t.tobytes()).hexdigest() for name, t in tensors.items()
    }
    del model.graph.initializer[:]
    graph = hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()
    return params, fingerprint_of({}, {"kind": "onnx", "graph": graph, "weights": hashes})


def _input_size(session: Any, path: Path) -> tuple[tuple[int, int] | None, bool]:
    """The one size the file takes, if any, and whether it takes one image at a time."""
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    if len(shape) != 4 or shape[1] != 3 or inputs[0].type != "tensor(float)":
        told = "; ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise CheckpointError(f"{path}: its input is {told}", "export it with one float input (B, 3, H, W)")
    batch, height, width = shape[0], shape[2], shape[3]
    if isinstance(batch, int) and batch != 1:
        raise CheckpointError(f"{path}: takes batches of {batch} only", "export it with a dynamic batch, or with 1")
    fixed = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    return fixed, isinstance(batch, int)


def adapter(request: LoadRequest) -> Encoder:
    """Load an ONNX file; mean and deviation are the card's, or ImageNet's where it states none (said in the notes).

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        NotFoundError: no such file.
        CheckpointError: a file that can't be read, or whose input or outputs are of another kind.
        CardError: unknown options or output names.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of(str(error.name), "onnx", f"the encoder '{request.card.name}'") from error
    card = request.card
    unknown = set(card.options) - {"outputs", "prefix"}
    if unknown:
        raise CardError(f"encoder '{card.name}': no option '{sorted(unknown)[0]}'", "known: outputs, prefix")
    path = request.weights or Path(card.source.file or "")
    if not path.is_file():
        raise NotFoundError(f"onnx:{path}: no such file", "check the path")
    params, fingerprint = _weights(path)
    session = _session(path, "CPUExecutionProvider")
    fixed, one = _input_size(session, path)
    side = fixed or (card.resolution if card.resolution > 1 else 224,) * 2
    if side[0] != side[1]:
        raise CheckpointError(
            f"{path}: was exported for {side[0]} x {side[1]} px", "export it for a square, or dynamic"
        )
    names = [o.name for o in session.get_outputs()]
    chosen = list(card.options.get("outputs", names))
    if absent := [n for n in chosen if n not in names]:
        raise CardError(f"encoder '{card.name}': {path.name} has no output '{absent[0]}'", f"it has {', '.join(names)}")
    probe = session.run(chosen, {session.get_inputs()[0].name: torch.zeros(1, 3, *side).numpy()})
    outputs: list[str] = []
    prefixes: list[int | None] = []
    widths, strides, skipped = [], [], []
    for name, out in zip(chosen, probe):
        shape = tuple(out.shape)
        if len(shape) == 4 and shape[2] == shape[3] and side[0] % shape[2] == 0 and shape[2] > 1:
            prefixes.append(None)
            grid, width = shape[2], shape[1]
        elif len(shape) == 3 and (layout := _tokens_layout(shape[1], side[0])) is not None:
            prefix, grid = layout
            width = shape[2]
            prefixes.append(int(card.options.get("prefix", prefix)))
            if prefixes[-1] != prefix:
                raise CardError(
                    f"encoder '{card.name}': output '{name}' has {prefix} tokens before a square grid", "mend 'prefix'"
                )
        else:
            skipped.append(f"{name} {list(shape)}")
            continue
        outputs.append(name)
        widths.append(int(width))
        strides.append(side[0] // grid)
    if not outputs or ("outputs" in card.options and skipped):
        raise CheckpointError(
            f"{path}: no map (B, D, h, w) and no tokens (B, N, D) among {', '.join(skipped)}", "export the features"
        )
    patch = max(strides)
    if card.patch > 1 and card.patch != patch:
        raise CardError(
            f"encoder '{card.name}': the card says patch {card.patch}, the file has {patch}", "mend the card"
        )
    mean, std = card.mean or IMAGENET_MEAN, card.std or IMAGENET_STD
    notes = ["outputs as the file gives them: norm changes nothing"]
    if card.mean is None or card.std is None:
        notes.append("no mean and std stated: ImageNet's taken")
    if skipped:
        notes.append(f"outputs left out: {', '.join(skipped)}")
    facts = EncoderFacts(
        name=card.name,
        family=request.family.family,
        arch=card.arch if card.patch > 1 else path.name,
        params=params,
        patch=patch,
        resolution=side[0],
        layers=len(outputs),
        widths=tuple(widths),
        strides=tuple(strides),
        mean=mean,
        std=std,
        license=card.license or request.family.license,
        source=path.name,
        sha256=fingerprint_of({}, {"file": fingerprint, "outputs": outputs, "mean": mean, "std": std}),
        notes=(*((card.note,) if card.note else ()), *notes),
    )
    return OnnxEncoder(path, facts, outputs, prefixes, fixed, one)
