"""Errors a user can mend. Each says in one line what went wrong, where, and how to fix it; the CLI prints that line and exits with 2."""

from __future__ import annotations

import re

__all__ = [
    "BankError",
    "CardError",
    "CheckpointError",
    "DataError",
    "MissingExtraError",
    "NotFoundError",
    "PlanError",
    "RecordError",
    "RiceEvalError",
    "UsageError",
    "one_line",
]


def one_line(text: str) -> str:
    r"""Text that is safe to show in one line: every run of white space, newlines included, is one blank.

    Control characters and those that turn the direction of what follows become escapes, e.g. ``\x1b`` or ``\u202e``: a name
    must neither drive a terminal nor rearrange the line it stands in.
    """
    return _UNSEEN.sub(lambda found: _escape(found[0]), " ".join(str(text).split()))


_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class RiceEvalError(Exception):
    """An error with a fix.

    Args:
        what: what is wrong and where (file, key or flag), one sentence with no full stop.
        fix: what the user can do about it; empty only where nothing can be done.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = one_line(what)
        self.fix = one_line(fix)
        super().__init__(self.what + (f"; {self.fix}" if self.fix else ""))

    def __reduce__(self) -> tuple[type[RiceEvalError], tuple[str, str]]:
        # Exceptions cross process boundaries (decoding workers, Ray): keep both parts.
        return type(self), (self.what, self.fix)


class UsageError(RiceEvalError):
    """A flag or argument that can't be taken."""


class NotFoundError(RiceEvalError):
    """A name that no registry or card knows."""


class CardError(RiceEvalError):
    """A card that does not fit its schema."""


class CheckpointError(RiceEvalError):
    """Weights that are missing, damaged, or of another architecture."""


class DataError(RiceEvalError):
    """A dataset that is missing, malformed or damaged."""


class PlanError(RiceEvalError):
    """A pair of encoder and task that can't work."""


class BankError(RiceEvalError):
    """A bank of tokens that can't be written or read."""


class RecordError(RiceEvalError):
    """A record that is damaged, edited, newer than this version, or not comparable."""


class MissingExtraError(RiceEvalError):
    """A package of an optional extra is not installed."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtraError:
        """The error for a missing ``package`` that ``extra`` brings and ``purpose`` needs."""
        return cls(
            f"{purpose} needs the package '{package}', which is not installed", f"pip install 'rice-eval[{extra}]'"
        )
