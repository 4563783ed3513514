"""Errors a user can mend. Each says in one line what went wrong, where, and how to fix it; the CLI prints that line and exits with 2."""

from __future__ import annotations

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
    """Collapse every run of white space, newlines included, to one blank."""
    return " ".join(str(text).split())


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
