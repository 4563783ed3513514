"""Names of the same weights in different files: tables from a file's own names to transformers' names, in both directions.

A rule pairs two templates, ``{n}`` standing for a block's number and ``{p}`` for ``weight`` or ``bias``. Strict comparison
happens in the file's own names, so that an error speaks of keys the user can find in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from rice_eval.adapters.checkpoints import Checkpoint, TensorInfo, compare, refuse_nan
from rice_eval.errors import CheckpointError

__all__ = ["Layout", "Rule", "block_rules", "count_blocks", "load_tensors", "view", "wanted"]

Names = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Rule:
    """One tensor under two names.

    Attributes:
        source: template of the name in the file, without the layout's prefix.
        target: template of transformers' name.
        part: which third of the rows is meant, where the file keeps q, k and v in one tensor; None for the whole tensor.
        turned: whether the file keeps the matrix transposed.
    """

    source: str
    target: str
    part: int | None = None
    turned: bool = False


@dataclass(frozen=True)
class Layout:
    """How one kind of file names its tensors.

    Attributes:
        name: shown to the user.
        rules: empty where the names are transformers' own.
        ignore: patterns of names (without prefix) that this kind of file may hold and no encoder needs.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    ignore: tuple[str, ...] = (r".*\binv_freq", r".*\bposition_ids")

    def ignores(self, name: str) -> bool:
        """Whether ``name`` is dropped on purpose."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)

    def targets(self, source: str) -> list[tuple[str, Rule | None]]:
        """transformers' names of a file's tensor; empty where the table has none."""
        if not self.rules:
            return [(source, None)]
        found: list[tuple[str, Rule | None]] = []
        for rule in self.rules:
            match = _pattern(rule.source).fullmatch(source)
            if match:
                found.append((rule.target.format(**match.groupdict()), rule))
        return found

    def source(self, target: str) -> tuple[str, Rule | None]:
        """The file's name of transformers' ``target``; the name itself where the table has none."""
        for rule in self.rules:
            match = _pattern(rule.target).fullmatch(target)
            if match:
                return rule.source.format(**match.groupdict()), rule
        return target, None


@lru_cache(maxsize=512)
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{p\}", r"(?P<p>weight|bias)")
    return re.compile(escaped)


def block_rules(source: str, target: str, names: Mapping[str, str], fused: str) -> tuple[Rule, ...]:
    """Rules of a pre-norm block whose q, k and v are one tensor.

    Args:
        source: the block's template in the file, such as ``blocks.{n}.``.
        target: the block's template in transformers.
        names: file's name -> transformers' name of each layer in the block that is not fused.
        fused: the file's name of the fused q, k, v tensor, ``{p}`` included.
    """
    rules = [Rule(f"{source}{a}.{{p}}", f"{target}{b}.{{p}}") for a, b in names.items()]
    rules += [Rule(source + fused, f"{target}self_attn.{q}_proj.{{p}}", part=i) for i, q in enumerate("qkv")]
    return tuple(rules)


def _piece(info: TensorInfo, rule: Rule | None) -> TensorInfo:
    shape = info.shape
    if rule is not None and rule.part is not None and shape:
        shape = (shape[0] // 3, *shape[1:])
    if rule is not None and rule.turned:
        shape = shape[::-1]
    return TensorInfo(shape, info.dtype)


def view(checkpoint: Checkpoint, layout: Layout, prefix: str) -> dict[str, TensorInfo]:
    """What the file holds under ``prefix``, in transformers' names and shapes; names the table lacks are left out."""
    seen: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if name.startswith(prefix):
            for target, rule in layout.targets(name[len(prefix) :]):
                seen[target] = _piece(info, rule)
    return seen


def count_blocks(names: Names, stem: str = "encoder.layers.") -> int:
    """Number of blocks: the highest number after ``stem``, plus one.

    Raises:
        CheckpointError: a number that the file's tensors can't have.
    """
    numbers = {int(m.group(1)) for m in (re.match(re.escape(stem) + r"(\d{1,9})\.", n) for n in names) if m}
    deepest = max(numbers, default=-1)
    if deepest > len(names):  # more blocks than tensors: nothing to build a model from
        raise CheckpointError(
            f"{stem}{deepest}: a block of this number among {len(numbers)} blocks",
            "the file's names are damaged: save or download it again",
        )
    return deepest + 1


def wanted(layout: Layout, prefix: str, want: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """``want`` (transformers' names and shapes) in the file's own names and shapes."""
    out: dict[str, tuple[int, ...]] = {}
    for target, shape in want.items():
        source, rule = layout.source(target)
        if rule is not None and rule.turned:
            shape = shape[::-1]
        if rule is not None and rule.part is not None and shape:
            shape = (3 * shape[0], *shape[1:])
        out[prefix + source] = shape
    return out


def load_tensors(
    checkpoint: Checkpoint, layout: Layout, prefix: str, want: Mapping[str, tuple[int, ...]], where: str, fix: str
) -> dict[str, Tensor]:
    """The tensors a model wants, in its names, after a strict comparison of names and shapes.

    Args:
        checkpoint: an opened file.
        layout: how it names its tensors.
        prefix: what stands before every name of the model in the file; other names are not looked at.
        want: transformers' names and shapes.
        where: file and family, for the message.
        fix: what to do when they do not match.

    Raises:
        CheckpointError: see ``compare``.
    """
    have = {n: i for n, i in checkpoint.tensors.items() if n.startswith(prefix)}
    ignore = {n for n in have if layout.ignores(n[len(prefix) :])}
    needed = wanted(layout, prefix, want)
    compare(have, needed, where, ignore=ignore, fix=fix)
    counts = [name for name in needed if not have[name].dtype.is_floating_point]
    if counts:
        raise CheckpointError(
            f"{where}: {counts[0]} holds {str(have[counts[0]].dtype)[6:]}, no weights", "save it in bf16, fp16 or fp32"
        )
    raw = checkpoint.read(list(needed))
    refuse_nan(raw, where)
    out = {}
    for target in want:
        source, rule = layout.source(target)
        tensor = raw[prefix + source]
        if rule is not None and rule.part is not None:
            tensor = tensor.chunk(3)[rule.part]
        out[target] = tensor.t() if rule is not None and rule.turned else tensor
    return out
