"""Reading checkpoints: what a file, folder or glob holds, from headers where the format has them, and nothing that runs code.

A checkpoint is opened (names, shapes, dtypes) before a tensor is read, so that a wrong one is refused at once. Formats:
``.safetensors`` (single, or sharded with an index), and ``.pt`` / ``.pth`` / ``.bin`` through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rice_eval.adapters.formats import (
    TensorInfo,
    few,
    is_safetensors,
    read_json,
    read_pickle,
    refuse_partial,
    safetensors_header,
    shards,
    weights_in,
)
from rice_eval.errors import CheckpointError, one_line

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "compare",
    "differences",
    "expand",
    "few",
    "open_checkpoint",
    "read_json",
    "refuse_nan",
    "strip_wrappers",
    "unusable",
]

# Prefixes that wrap a whole model: DistributedDataParallel, torch.compile, and the usual names of an averaged copy.
_TRAINING = ("module.", "_orig_mod.", "ema_model.", "model_ema.", "ema.", "averaged_model.")
_WRAPPERS = (*_TRAINING, "model.", "backbone.", "encoder.", "net.")
# Types of weights, and of the counters and indices that some models keep beside them.
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)


@dataclass
class Checkpoint:
    """An opened checkpoint: what it holds, and a way to read it.

    Attributes:
        path: the file or folder as the user named it.
        folder: where files beside the weights (``config.json``, tokenizer, preprocessor) lie.
        tensors: name -> shape and dtype, in the file's order.
        metadata: the free text fields of safetensors headers.
        stripped: wrapper prefixes taken off every name.
    """

    path: Path
    folder: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    stripped: str = ""
    _files: dict[str, Path] = field(default_factory=dict, repr=False)
    _loaded: dict[str, Tensor] | None = field(default=None, repr=False)
    _inner: dict[str, str] = field(default_factory=dict, repr=False)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """The tensors called ``names``, on the CPU, as stored.

        Raises:
            CheckpointError: a file that can't be read, or mapped into memory.
        """
        if self._loaded is not None:
            return {name: self._loaded[self._inner.get(name, name)] for name in names}
        from safetensors import SafetensorError, safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[self._inner.get(name, name)], []).append(name)
        out: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in inside:
                        out[name] = handle.get_tensor(self._inner.get(name, name))
            except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: no room to map it
                raise CheckpointError(
                    f"{file}: can't be read ({one_line(str(error))})", "check file and memory"
                ) from error
        return {name: out[name] for name in names}

    def config(self) -> dict[str, Any] | None:
        """``config.json`` beside the weights, or None.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        return read_json(self.folder / "config.json")

    def renamed(self, names: Mapping[str, str], stripped: str) -> Checkpoint:
        """The same checkpoint under other names (new -> old)."""
        # replace() keeps what a subclass knows, such as the configuration of a part of a larger model.
        return replace(
            self,
            tensors={new: self.tensors[old] for new, old in names.items()},
            stripped=self.stripped + stripped,
            _inner={new: self._inner.get(old, old) for new, old in names.items()},
        )


def expand(path: str | Path) -> tuple[Path, str | None]:
    """The one path behind ``--weights`` and the slot named after ``::``, if any.

    Args:
        path: a file, a folder, a glob that matches one of them; ``FILE::KEY`` picks one state dict inside a training
            file, ``FILE::KEY::KEY`` one that lies deeper.

    Raises:
        CheckpointError: nothing there, or a glob with several matches.
    """
    text = str(path)
    text, _, slot = text.partition("::")
    found = Path(text).expanduser()
    try:
        there = found.exists()
    except (OSError, ValueError) as error:  # a name that the file system can't hold
        raise CheckpointError(f"--weights {text[:80]}: can't be a path ({type(error).__name__})", "check it") from error
    if not there and any(mark in text for mark in "*?["):
        matches = sorted(glob.glob(str(found)))
        if len(matches) != 1:
            names = f"{len(matches)} paths ({few(matches)})" if matches else "nothing"
            raise CheckpointError(f"--weights {text}: matches {names}", "give a pattern that matches one path")
        found = Path(matches[0])
    if not found.exists():
        raise CheckpointError(f"--weights {text}: no such file or folder", "check the path")
    return found, slot or None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: names, shapes and dtypes; safetensors are not read beyond their headers.

    Raises:
        CheckpointError: missing, damaged or partial files, code in a pickle, several candidates in a folder.
    """
    found, slot = expand(path)
    if found.is_dir():
        weights = weights_in(found)
        folder = found
    else:
        weights, folder = found, found.parent
    if weights.name.endswith(".index.json"):
        files = shards(weights)
    else:
        files = [weights]
    for file in files:
        refuse_partial(file)
    if all(is_safetensors(file) for file in files):
        if slot:
            raise CheckpointError(
                f"{weights}: '::{slot}' picks a state dict inside a .pt file, this is safetensors", "leave it out"
            )
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        owner: dict[str, Path] = {}
        for file in files:
            inside, meta = safetensors_header(file)
            twice = [name for name in inside if name in tensors]
            if twice:
                raise CheckpointError(
                    f"{file}: holds keys that {owner[twice[0]].name} holds as well ({few(twice)})",
                    "save it again: which of them counts is not told",
                )
            tensors.update(inside)
            metadata.update(meta)
            owner.update(dict.fromkeys(inside, file))
        return Checkpoint(found, folder, tensors, metadata, _files=owner)
    loaded: dict[str, Tensor] = {}
    for file in files:
        loaded.update(read_pickle(file, slot))
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in loaded.items()}
    return Checkpoint(found, folder, infos, _loaded=loaded)


def strip_wrappers(checkpoint: Checkpoint, *, training_only: bool = False) -> Checkpoint:
    """Take off prefixes such as ``module.`` and ``_orig_mod.``, each only where every name carries it.

    Averaged copies beside the live weights in one flat file are a question for the user, not for a rule.

    Args:
        checkpoint: an opened file.
        training_only: leave ``model.`` and the like, which may be the model's own.

    Raises:
        CheckpointError: two names become one, or a file that holds both live and averaged weights.
    """
    names = {name: name for name in checkpoint.tensors}
    taken = ""
    wrappers = _TRAINING if training_only else _WRAPPERS
    for _ in range(4):
        prefix = next((w for w in wrappers if names and all(n.startswith(w) and len(n) > len(w) for n in names)), None)
        if prefix is None:
            break
        names = {new[len(prefix) :]: old for new, old in names.items()}
        taken += prefix
    if any("_orig_mod." in name for name in names):  # torch.compile on a submodule leaves its mark inside the names
        cleaned = {new.replace("_orig_mod.", ""): old for new, old in names.items()}
        if len(cleaned) != len(names):
            raise CheckpointError(
                f"{checkpoint.path}: names with and without '_orig_mod.' collide",
                "save the state dict of the uncompiled model",
            )
        names, taken = cleaned, taken + "_orig_mod."
    for mark in ("ema_model.", "model_ema.", "ema."):
        averaged = [n for n in names if n.startswith(mark)]
        if averaged and any(n[len(mark) :] in names or "model." + n[len(mark) :] in names for n in averaged):
            raise CheckpointError(
                f"{checkpoint.path}: holds live weights and an averaged copy under '{mark}' ({few(averaged, 2)})",
                "save the one to evaluate in a file of its own",
            )
    return checkpoint.renamed(names, taken) if taken else checkpoint


def differences(
    have: Mapping[str, TensorInfo], want: Mapping[str, tuple[int, ...]], ignore: Collection[str] = ()
) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, unexpected, and of another shape; arguments as in ``compare``."""
    missing = [name for name in want if name not in have]
    unexpected = [name for name in have if name not in want and name not in ignore]
    return missing, unexpected, [name for name in want if name in have and have[name].shape != want[name]]


def unusable(have: Mapping[str, TensorInfo], want: Collection[str]) -> list[str]:
    """Wanted names whose type is no weight's (fp8 and 8-bit integers need scales that no encoder here reads), with the type."""
    return [f"{n} is {str(have[n].dtype)[6:]}" for n in want if n in have and have[n].dtype not in _TYPES]


def refuse_nan(tensors: Mapping[str, Tensor], where: str) -> None:
    """Weights must be finite.

    Raises:
        CheckpointError: NaN or Inf among them; the first few tensors are named.
    """
    # A sum is NaN or Inf if any value is; the few false alarms are looked at again.
    bad = [
        name
        for name, t in tensors.items()
        if t.is_floating_point()
        and not torch.isfinite(t.sum(dtype=torch.float32))
        and not bool(torch.isfinite(t).all())
    ]
    if bad:
        raise CheckpointError(
            f"{where}: NaN or Inf in {len(bad)} tensors ({few(bad)})", "the training diverged: take an earlier step"
        )


def compare(
    have: Mapping[str, TensorInfo],
    want: Mapping[str, tuple[int, ...]],
    where: str,
    *,
    ignore: Collection[str] = (),
    fix: str = "check that the encoder's name fits the checkpoint (rice-eval encoders inspect says what it is)",
) -> None:
    """Names and shapes must agree exactly.

    Args:
        have: what the checkpoint holds.
        want: what the model needs.
        where: file and family, for the message.
        ignore: names the checkpoint may hold in vain.
        fix: what to do about it.

    Raises:
        CheckpointError: missing or unexpected names, or shapes that differ; the first few are named.
    """
    missing, unexpected, shapes = differences(have, want, ignore)
    problems = []
    if missing:
        problems.append(f"{len(missing)} keys missing ({few(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} keys unexpected ({few(unexpected)})")
    if shapes:
        told = []
        for name in shapes[:3]:
            turned = have[name].shape == want[name][::-1]
            told.append(
                f"{name} is {list(have[name].shape)}, not {list(want[name])}" + (": transposed" if turned else "")
            )
        more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
        problems.append(f"{len(shapes)} shapes differ ({'; '.join(told)}{more})")
    types = unusable(have, want)
    if types:
        problems.append(f"{len(types)} tensors are not bf16, fp16 or fp32 ({few(types)})")
    if problems:
        raise CheckpointError(f"{where}: " + ", ".join(problems), fix)
