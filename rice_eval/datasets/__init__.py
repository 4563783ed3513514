"""Datasets: readers of real on-disk layouts, all in one set of types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rice_eval.registry import datasets

if TYPE_CHECKING:
    from rice_eval.datasets.base import Dataset, DatasetFactory

__all__ = ["load_dataset"]


def load_dataset(
    name: str, split: str, data: str | Path | None = None, options: Mapping[str, Any] | None = None
) -> Dataset:
    """One split of a dataset by its registry name.

    Args:
        name: a name from ``rice-eval list datasets``.
        split: the split's own name.
        data: the user's folder or zip; None for embedded sets.
        options: the reader's options.

    Raises:
        NotFoundError: no such dataset.
        DataError: the folder lacks something the layout needs; the message names it.
        UsageError: an option the reader does not have.
    """
    factory = cast("DatasetFactory", datasets.get(name))
    return factory(split, Path(data) if data is not None else None, options or {})
