"""``lmms-eval``: benchmarks whose images lmms-eval reads itself; nothing of them is read here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rice_eval.datasets.base import Dataset
from rice_eval.errors import UsageError

__all__ = ["factory"]


def factory(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """The registry's entry.

    Raises:
        UsageError: always; such a benchmark runs through ``rice-eval mllm --model``.
    """
    raise UsageError(
        "this benchmark is read and scored by lmms-eval, on a multimodal model",
        "run rice-eval mllm --model MODEL --task TASK",
    )
