"""Scores of strings that were read: accuracy, edit distances, ANLS. Distances are rapidfuzz's, over Unicode code points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rice_eval.errors import MissingExtraError

__all__ = [
    "ANLS_THRESHOLD",
    "LINE_METRICS",
    "LineScore",
    "anls",
    "distance",
    "line_sums",
    "normalise",
    "one_minus_ned",
    "word_distance",
]

ANLS_THRESHOLD = 0.5
"""Similarities below it count as 0 (Biten et al., arXiv 1905.13648, section 5; used by DocVQA)."""


def _levenshtein() -> Any:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise MissingExtraError.of("rapidfuzz", "ocr", "scoring text") from error
    return Levenshtein


def normalise(text: str) -> str:
    """Lower case, letters a to z and digits alone: what the recognition benchmarks compare.

    The filter is that of the field (Baek et al., arXiv 1904.01906): ASCII letters and digits; accented letters drop out.
    """
    return "".join(c for c in text.lower() if c.isascii() and c.isalnum())


def distance(truth: str, read: str) -> int:
    """Levenshtein distance in code points."""
    return int(_levenshtein().distance(truth, read))


def word_distance(truth: str, read: str) -> int:
    """Levenshtein distance in words, which blanks of any kind part."""
    return int(_levenshtein().distance(truth.split(), read.split()))


def one_minus_ned(truth: str, read: str) -> float:
    """1 - distance / length of the longer one, 0 to 1; two empty strings score 1 (ICDAR 2019 ReCTS and LSVT)."""
    longest = max(len(truth), len(read))
    return 1.0 - distance(truth, read) / longest if longest else 1.0


def anls(answers: Sequence[str], read: str, threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one question, 0 to 1: the best over its accepted answers.

    As lmms-eval 0.7.3 computes it: both sides are lower-cased, stripped, and have every run of blanks made one before the
    distance is taken, and that is divided by the longer of the two strings as they were given, in capitals (``ß`` then counts
    two). Similarities below ``threshold`` count as 0; the paper also sets one of exactly ``threshold`` to 0, lmms-eval keeps
    it, and so does this.

    Args:
        answers: accepted answers, one or more. A list of questions scores the mean over questions.
        read: what was answered.
        threshold: see ``ANLS_THRESHOLD``.

    Raises:
        ValueError: no answer.
    """
    if not answers:
        raise ValueError("a question needs at least one answer")
    given = " ".join(read.strip().lower().split())
    nearest = 1.0
    for answer in answers:
        truth = " ".join(answer.strip().lower().split())
        longest = max(len(answer.upper()), len(read.upper()))
        nearest = min(nearest, distance(truth, given) / longest if longest else 0.0)
    return 1.0 - nearest if 1.0 - nearest >= threshold else 0.0


@dataclass(frozen=True)
class LineScore:
    """One line's share of every metric of ``LINE_METRICS``: ``numerators`` and ``denominators`` in that order."""

    numerators: tuple[float, ...]
    denominators: tuple[float, ...]


LINE_METRICS = ("word_accuracy", "word_accuracy_exact", "one_minus_ned", "cer", "wer", "anls")
"""Accuracy ignoring case and all but letters and digits, exact accuracy, 1-NED, edits a true character, edits a true word, ANLS."""


def line_sums(truth: str, read: str) -> LineScore:
    """What one line adds to the sums; accuracies, 1-NED, CER and WER are ratios of sums over lines.

    A true line that has no letter or digit (``-``) can't be compared by ``word_accuracy`` and counts in it as right where it
    is read exactly.
    """
    plain = normalise(truth)
    same = plain == normalise(read) if plain else truth == read
    chars, words = distance(truth, read), word_distance(truth, read)
    return LineScore(
        (float(same), float(truth == read), one_minus_ned(truth, read), chars, words, anls([truth], read)),
        (1.0, 1.0, 1.0, len(truth), len(truth.split()), 1.0),
    )
