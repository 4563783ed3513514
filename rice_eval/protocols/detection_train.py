"""Training of detection heads on banked tokens: batches of one grid, parameter groups, moments, the log of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rice_eval.probes.linear import Moments
from rice_eval.protocols.detection import Sample, TrainBoxes

__all__ = ["LossLog", "by_grid", "decayed", "maps_of", "moments_of"]


class LossLog:
    """Losses of every step, and the parts they are sums of, kept as ten means over tenths of the training.

    Args:
        grows: parts that rise while a detector learns, because more boxes come to count in them; what is left is what has to
            fall. None by default.
    """

    def __init__(self, grows: Callable[[str], bool] = lambda part: False) -> None:
        self._values: list[float] = []
        self._parts: dict[str, list[float]] = {}
        self._grows = grows

    def add(self, loss: float, parts: Mapping[str, float] | None = None) -> None:
        """Take in one step's loss, and its parts, the same ones in every step."""
        self._values.append(loss)
        for name, value in (parts or {}).items():
            self._parts.setdefault(name, []).append(value)

    def tenths(self) -> list[float]:
        """At most ten means, first to last."""
        return _tenths(self._values)

    def parts(self) -> dict[str, list[float]]:
        """The same of every part."""
        return {name: _tenths(values) for name, values in self._parts.items()}

    def warnings(self) -> tuple[str, ...]:
        """One line where the losses did not fall, or are not finite."""
        steady = [values for name, values in self._parts.items() if not self._grows(name)]
        marks = _tenths([sum(step) for step in zip(*steady)]) if steady else self.tenths()
        if len(marks) > 1 and not marks[-1] < marks[0]:
            return (f"the training loss did not fall ({marks[0]:.3f} to {marks[-1]:.3f})",)
        return ()


def _tenths(values: Sequence[float]) -> list[float]:
    parts = np.array_split(np.array(values), min(10, max(1, len(values))))
    return [round(float(p.mean()), 5) for p in parts if len(p)]


def moments_of(passes: Sequence[TrainBoxes], layer: int, with_held: bool) -> Moments:
    """Feature moments of a layer over all views; of the images fitted on alone, or of all."""
    total = Moments(len(passes[0].fit_moments[layer].total))
    for part in passes:
        total = total + part.fit_moments[layer]
        if with_held:
            total = total + part.held_moments[layer]
    return total


def decayed(model: torch.nn.Module, wd: float) -> list[dict[str, object]]:
    """Parameter groups: weight decay on matrices and kernels, none on norms, biases and single numbers."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": wd}, {"params": rest, "weight_decay": 0.0}]


def by_grid(samples: Sequence[Sample], layer: int) -> list[list[Sample]]:
    """Samples of one grid and frame size together, so that each group is one batch."""
    groups: dict[tuple[tuple[int, int], tuple[int, int]], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.grids[layer], sample.frame.size), []).append(sample)
    return list(groups.values())


def maps_of(samples: Sequence[Sample], layer: int, device: torch.device) -> Tensor:
    """``(B, D, h, w)`` of samples of one grid."""
    h, w = samples[0].grids[layer]
    tokens = torch.stack([s.maps[layer] for s in samples]).to(device, torch.float32)
    return tokens.transpose(1, 2).reshape(len(samples), -1, h, w)
