"""The tensors of a TorchScript archive, read without running any of its code.

OpenAI's CLIP files are such archives: ``data.pkl`` holds the tree of modules, ``data/N`` the bytes of the tensors, ``code/`` the
program, which is not looked at. The pickle is read by an unpickler that knows a handful of names, all of them its own: a
scripted class becomes a plain holder of attributes, a storage a reference to its bytes. Any other name is refused.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rice_eval.errors import CheckpointError

__all__ = ["is_torchscript", "read_torchscript"]

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
# Lists of numbers and annotated containers among a module's attributes; what they hold is handed through.
_HANDED_THROUGH = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


@dataclass(frozen=True)
class _Stored:
    """A tensor that has not been read."""

    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Holder:
    """Stands for an object of a scripted class: its attributes and nothing else."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
            raise pickle.UnpicklingError("a module whose state is no table of names")
        self.attributes = state


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *_grad_and_hooks: Any) -> _Stored:
    numbers = (offset, *shape, *stride)
    if not (
        isinstance(storage, tuple) and len(shape) == len(stride) and all(type(n) is int and n >= 0 for n in numbers)
    ):
        raise pickle.UnpicklingError("a tensor with impossible numbers")
    return _Stored(storage[0], storage[1], offset, tuple(shape), tuple(stride))


def _first(value: Any, *_tag: Any) -> Any:
    return value


class _Call:
    """A function that a pickle may call and can't change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function is given a state")


class _Unpickler(pickle.Unpickler):
    """Knows scripted classes, tensors, storages and ordered dictionaries."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Holder
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _Call(_rebuild)
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module in ("torch.jit._pickle", "torch.jit._pickle_functions") and name in _HANDED_THROUGH:
            return _Call(_first)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise CheckpointError(
            f"a TorchScript archive whose pickle names {module}.{name}; it was not run",
            "save the bare state dict where you trust the file, best as .safetensors",
        )

    def persistent_load(self, pid: Any) -> Any:
        if (
            not isinstance(pid, tuple)
            or len(pid) < 3
            or pid[0] != "storage"
            or not isinstance(pid[1], torch.dtype)
            or not isinstance(pid[2], str)
        ):
            raise pickle.UnpicklingError("an unknown kind of reference")
        return pid[2], pid[1]


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether a zip is TorchScript's: it has constants beside its data."""
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, as ``torch.jit.load(file).state_dict()`` would name them, on the CPU, as stored.

    Tensors that a module keeps as plain attributes are among them: without the code nothing tells them from buffers.

    Raises:
        CheckpointError: names that are no part of a tree of modules and tensors, or a damaged archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            root = next(n for n in archive.namelist() if n.endswith("/constants.pkl")).rpartition("/")[0]
            members = set(archive.namelist())
            if any(
                entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist() if "/data" in entry.filename
            ):
                raise ValueError("compressed, which torch does not write")
            order = archive.read(f"{root}/byteorder").decode().strip() if f"{root}/byteorder" in members else "little"
            if order != sys.byteorder:
                raise CheckpointError(f"{file}: was written on a {order}-endian machine", "save it again on this one")
            with archive.open(f"{root}/data.pkl") as handle:
                try:
                    tree = _Unpickler(handle).load()
                except CheckpointError as error:
                    raise CheckpointError(f"{file}: {error.what}", error.fix) from None
            stored = dict(_walk(tree, ""))
            records: dict[str, bytearray] = {}

            def record(name: str) -> bytearray:
                if name not in records:
                    records[name] = bytearray(archive.read(f"{root}/data/{name}"))
                return records[name]

            out = {name: _tensor(one, record) for name, one in stored.items()}
    except CheckpointError:
        raise
    except (
        pickle.UnpicklingError, zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError, KeyError, ValueError,
        TypeError, AttributeError, IndexError, RuntimeError, StopIteration, RecursionError, MemoryError,
        NotImplementedError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file}: a TorchScript archive that is truncated or damaged ({reason})", "download it again"
        ) from error
    if not out:
        raise CheckpointError(f"{file}: a TorchScript archive without tensors", "save the model's state_dict()")
    return out


def _walk(node: Any, at: str) -> Iterator[tuple[str, _Stored]]:
    """Tensors and their dotted names; lists and tables of tensors are no part of a state dict."""
    if isinstance(node, _Stored):
        yield at, node
    elif isinstance(node, _Holder):
        for name, value in node.attributes.items():
            if isinstance(value, (_Stored, _Holder)):
                yield from _walk(value, f"{at}.{name}" if at else name)


def _tensor(one: _Stored, record: Callable[[str], bytearray]) -> Tensor:
    data = record(one.record)
    if 0 in one.shape:
        return torch.empty(one.shape, dtype=one.dtype)
    last = one.offset + sum((n - 1) * step for n, step in zip(one.shape, one.stride))
    if (last + 1) * one.dtype.itemsize > len(data):
        raise ValueError(f"data/{one.record} is shorter than its tensor")
    return torch.frombuffer(data, dtype=one.dtype).as_strided(one.shape, one.stride, one.offset)
