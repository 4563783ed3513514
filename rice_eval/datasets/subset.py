"""The first N images of a dataset, as a dataset of its own: another fingerprint, so never ranked with the whole."""

from __future__ import annotations

import hashlib
from typing import Any

from rice_eval.datasets.base import Dataset
from rice_eval.errors import UsageError

__all__ = ["Subset"]


class Subset(Dataset):
    """``n`` images spread evenly over ``base``, in its order; everything else is forwarded to it.

    Args:
        base: the whole split.
        n: how many images, 1 or more; all of them where the split has fewer.

    Raises:
        UsageError: ``n`` below 1.
    """

    def __init__(self, base: Dataset, n: int) -> None:
        if n < 1:
            raise UsageError(f"a limit of {n} images leaves nothing", "give 1 or more")
        self.base = base
        count = min(n, len(base))
        self.picked = tuple(k * len(base) // count for k in range(count))
        self.name, self.split = base.name, base.split
        self.classes, self.things, self.palette, self.provides = base.classes, base.things, base.palette, base.provides

    def __len__(self) -> int:
        return len(self.picked)

    @property
    def fingerprint(self) -> str:
        """Of the base, and of the images picked where that is not all of them."""
        if len(self.picked) == len(self.base):
            return self.base.fingerprint
        return hashlib.sha256(f"{self.base.fingerprint}/{len(self.picked)}".encode()).hexdigest()

    def image_id(self, index: int) -> str:
        """See ``Dataset``."""
        return self.base.image_id(self.picked[index])

    def size(self, index: int) -> tuple[int, int]:
        """See ``Dataset``."""
        return self.base.size(self.picked[index])

    def image(self, index: int) -> Any:
        """See ``Dataset``."""
        return self.base.image(self.picked[index])

    def semantic(self, index: int) -> Any:
        """See ``Dataset``."""
        return self.base.semantic(self.picked[index])

    def instances(self, index: int) -> Any:
        """See ``Dataset``."""
        return self.base.instances(self.picked[index])

    def text(self, index: int) -> Any:
        """See ``Dataset``."""
        return self.base.text(self.picked[index])

    def depth(self, index: int) -> Any:
        """See ``Dataset``."""
        return self.base.depth(self.picked[index])

    def points(self, index: int) -> Any:
        """See ``Dataset``."""
        return self.base.points(self.picked[index])

    def questions(self, index: int) -> Any:
        """See ``Dataset``."""
        return self.base.questions(self.picked[index])
