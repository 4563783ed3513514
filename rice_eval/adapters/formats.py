"""The file formats a checkpoint comes in, read without running code: safetensors headers, indexes, torch pickles."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rice_eval.adapters.torchscript import is_torchscript, read_torchscript
from rice_eval.errors import CheckpointError

__all__ = [
    "TensorInfo",
    "few",
    "is_safetensors",
    "read_json",
    "read_pickle",
    "refuse_partial",
    "safetensors_header",
    "shards",
    "weights_in",
]

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_PARTIAL = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp", ".download")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
# Keys under which training scripts keep a state dict, in no order: two of them in one file are a question for the user.
_SLOTS = ("state_dict", "model", "module", "model_state_dict", "model_state", "net", "weights", "student", "teacher")
_EMA_SLOTS = ("state_dict_ema", "model_ema", "ema", "ema_model", "ema_state_dict")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def few(names: Collection[str], limit: int = 3) -> str:
    """The first few names and how many more there are, for a message."""
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from ``path``; None where there is no such file.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})", "download or write it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object", "download or write it again")
    return data


def weights_in(folder: Path) -> Path:
    for name in (
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
    ):
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(folder.glob("*.safetensors")) or sorted(p for s in _PICKLES for p in folder.glob("*" + s))
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise CheckpointError(
            f"{folder}: holds {len(candidates)} checkpoints ({few([p.name for p in candidates])}) and no index",
            "name one file",
        )
    partial = sorted(p.name for s in _PARTIAL for p in folder.glob("*" + s))
    if partial:
        raise CheckpointError(f"{folder}: holds only a partial download ({few(partial)})", "finish the download")
    if (folder / "snapshots").is_dir():
        raise CheckpointError(
            f"{folder}: the hub's cache of a whole repository", f"point --weights at {folder / 'snapshots'}/REVISION"
        )
    raise CheckpointError(
        f"{folder}: holds no .safetensors, .pt, .pth, .bin or .ckpt file", "point --weights at the checkpoint"
    )


def shards(index: Path) -> list[Path]:
    data = read_json(index) or {}
    listed = data.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
        raise CheckpointError(f"{index}: has no weight_map", "download it again")
    names = sorted(set(listed.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: points outside its folder ({few(outside)})", "do not use this checkpoint")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"{index.parent}: shards are missing ({few(absent)})", "finish the download")
    if index.name.endswith(".safetensors.index.json"):
        for name in names:
            held, _ = safetensors_header(index.parent / name)
            promised = {key for key, file in listed.items() if file == name}
            lost = sorted(promised - set(held))
            if lost:
                raise CheckpointError(
                    f"{index.parent / name}: lacks keys its index promises ({few(lost)})", "download the shard again"
                )
    return [index.parent / name for name in names]


def refuse_partial(file: Path) -> None:
    beside = [file.with_name(file.name + suffix) for suffix in _PARTIAL]
    unfinished = [p.name for p in beside if p.exists()]
    if file.suffix in _PARTIAL or unfinished:
        raise CheckpointError(
            f"{file}: a partial download ({few(unfinished) or file.name})", "finish the download or remove the leftover"
        )
    try:
        with file.open("rb") as handle:
            head = handle.read(64)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: links to a file that is not there", "download it again") from error
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror})", "check its permissions") from error
    if not head:
        raise CheckpointError(f"{file}: is empty", "download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: a git-lfs pointer, not the weights", "run git lfs pull, or download the file")


def is_safetensors(file: Path) -> bool:
    """Whether a file is read as safetensors: by its name, or by its first bytes (the hub's cache names files by their hash)."""
    if file.suffix == ".safetensors":
        return True
    with file.open("rb") as handle:
        head = handle.read(9)
    return len(head) == 9 and 2 <= int.from_bytes(head[:8], "little") <= _LONGEST_HEADER and head[8:] == b"{"


def safetensors_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Names, shapes, dtypes and metadata, checked against the file's size (format: github.com/huggingface/safetensors)."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > _LONGEST_HEADER:
                raise CheckpointError(f"{file}: not a safetensors file", "name it after the format it is in")
            if length > size - 8:
                raise CheckpointError(
                    f"{file}: truncated, its header of {length} bytes does not fit {size} bytes", "download it again"
                )
            header = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", {})
        odd = sorted({str(entry["dtype"]) for entry in header.values()} - set(_DTYPES))
        if odd:
            raise CheckpointError(
                f"{file}: holds tensors of type {few(odd)}, which are no weights to run",
                "save it in bf16, fp16 or fp32",
            )
        tensors = {
            name: TensorInfo(tuple(int(n) for n in entry["shape"]), _DTYPES[entry["dtype"]])
            for name, entry in header.items()
        }
        for name, info in tensors.items():
            begin, stop = header[name]["data_offsets"]
            if min(info.shape, default=0) < 0 or stop - begin != math.prod(info.shape) * info.dtype.itemsize:
                raise ValueError(f"{name} is {list(info.shape)} in {stop - begin} bytes")
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a safetensors file, or damaged ({type(error).__name__}: {error})", "download it again"
        ) from error
    if size != 8 + length + end:
        kind = "truncated" if size < 8 + length + end else "damaged"
        raise CheckpointError(
            f"{file}: {kind}, {size} bytes where its header asks for {8 + length + end}", "download it again"
        )
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def read_pickle(file: Path, slot: str | None) -> dict[str, Tensor]:
    archive = zipfile.is_zipfile(file)
    if archive:
        with zipfile.ZipFile(file) as handle:
            scripted = is_torchscript(handle)
        if scripted:
            if slot is not None:
                raise CheckpointError(f"{file}: a TorchScript archive has no '{slot}' inside", "leave out ::KEY")
            return read_torchscript(file)
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named or re.search(
            r"unsupported (class|global)|can only build|trying to (call|instantiate)", str(error), re.I
        ):
            what = f" ({named.group(1)})" if named else ""
            raise CheckpointError(
                f"{file}: a pickle that holds code or objects beside tensors{what}; it was not run",
                "save the bare state dict, best as .safetensors",
            ) from error
        raise CheckpointError(f"{file}: not a readable torch file, or damaged", "download or save it again") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: truncated or damaged ({reason})", "download or save it again") from error
    state = _state_dict(data, file, slot)
    odd = [name for name, t in state.items() if t.layout is not torch.strided or t.is_quantized or t.is_meta]
    if odd:
        raise CheckpointError(
            f"{file}: {len(odd)} tensors are sparse, quantised or without data ({few(odd)})",
            "save plain tensors, best as .safetensors",
        )
    return state


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _state_dict(data: object, file: Path, slot: str | None) -> dict[str, Tensor]:
    if slot is not None:
        inner: object = data
        for key in slot.split("::"):
            data, inner = inner, inner.get(key) if isinstance(inner, Mapping) else None
        if inner is None or not _is_state_dict(inner):
            known = few(list(map(str, data)), 6) if isinstance(data, Mapping) else "no slots"
            if isinstance(inner, Mapping):
                known = f"{few(list(map(str, inner)), 6)}; go deeper with ::, or save a plain state dict"
            raise CheckpointError(f"{file}: holds no state dict under '{slot}'", f"it holds {known}")
        return {str(name): tensor for name, tensor in cast("Mapping[str, Tensor]", inner).items()}
    if not isinstance(data, Mapping):
        raise CheckpointError(
            f"{file}: holds a {type(data).__name__}, not a state dict", "save the model's state_dict()"
        )
    inner_dicts = [str(k) for k, v in data.items() if str(k) in (*_SLOTS, *_EMA_SLOTS) and _is_state_dict(v)]
    if len(inner_dicts) > 1:
        raise CheckpointError(
            f"{file}: holds {len(inner_dicts)} state dicts ({', '.join(inner_dicts)})",
            f"choose one: --weights {file.name}::{inner_dicts[0]}",
        )
    if inner_dicts:
        return dict(cast("Mapping[str, Tensor]", data[inner_dicts[0]]))
    flat = {str(k): v for k, v in data.items() if isinstance(v, Tensor)}
    others = [str(k) for k, v in data.items() if isinstance(v, Mapping) and _is_state_dict(v)]
    if not flat:
        nested = [str(k) for k, v in data.items() if isinstance(v, Mapping) and v]
        hint = f"choose one: --weights {file.name}::{others[0]}" if others else "save the model's state_dict()"
        if nested and not others:
            hint = f"name the way to it, --weights {file.name}::{nested[0]}::KEY, or save the model's state_dict()"
        raise CheckpointError(f"{file}: holds no tensors at its top ({few(list(map(str, data)), 4) or 'empty'})", hint)
    return flat
