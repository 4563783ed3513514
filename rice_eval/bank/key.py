"""The key of a bank entry: everything that decides its bytes, in clear text and as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from rice_eval.errors import BankError, UsageError

__all__ = ["COMPUTES", "FORMAT_VERSION", "TOKEN_DTYPES", "BankKey", "Compute", "TokenDtype", "check_dtype"]

FORMAT_VERSION = 1
"""Raised whenever the layout of a shard or the meaning of a field changes: older entries are then simply other entries."""

TokenDtype = Literal["fp16", "bf16", "fp32", "int8"]
TOKEN_DTYPES: tuple[TokenDtype, ...] = get_args(TokenDtype)

Compute = Literal["weights", "bf16", "fp16", "weights+compile", "bf16+compile", "fp16+compile"]
COMPUTES: tuple[Compute, ...] = get_args(Compute)


@dataclass(frozen=True)
class BankKey:
    """What an entry holds.

    Attributes:
        encoder: fingerprint of the encoder (weights and architecture's numbers, mean and deviation among them).
        dataset: fingerprint of the split.
        view: canonical text of the resolved view.
        layers: layers stored, counted from 1, ascending.
        norm: whether the final norm was applied.
        dtype: how tokens are stored: ``fp16``, ``bf16``, ``fp32``, or ``int8`` with one scale a token.
        compute: ``weights`` where the forward ran in the weights' own type, else autocast's type; ``+compile`` where its
            blocks were compiled.
        fill: RGB, 0 to 255, of the pixels that a view adds.
        format: version of the layout.
    """

    encoder: str
    dataset: str
    view: str
    layers: tuple[int, ...]
    norm: bool
    dtype: TokenDtype
    compute: Compute = "weights"
    fill: tuple[int, int, int] = (124, 116, 104)
    format: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """sha256 over every field, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Every field as plain JSON values, as a manifest shows them."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> BankKey:
        """The key written in a manifest.

        Raises:
            BankError: fields that are missing, unknown or of another type.
        """
        try:
            values = dict(facts)
            values["layers"] = tuple(int(v) for v in values["layers"])
            values["fill"] = tuple(int(v) for v in values["fill"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise BankError(f"a manifest's facts can't be read ({error})", "run rice-eval bank verify") from error

    def serves(self, wanted: BankKey) -> bool:
        """Whether this entry has every layer of ``wanted`` and agrees in everything else."""
        mine, other = asdict(self), asdict(wanted)
        have, need = set(mine.pop("layers")), set(other.pop("layers"))
        return mine == other and need <= have


def check_dtype(dtype: str) -> TokenDtype:
    """``dtype`` if tokens can be stored so.

    Raises:
        UsageError: any other name.
    """
    for known in TOKEN_DTYPES:
        if dtype == known:
            return known
    raise UsageError(f"tokens can't be stored as '{dtype}'", f"choose one of {', '.join(TOKEN_DTYPES)}")
