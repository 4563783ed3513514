"""Protocols ``gram-lda`` and ``gram-ridge``: closed-form probes from sums that ride on the pass.

No step size and no order of batches: two runs give the same head, so they suit regression gates. They are protocols of their own,
never reported as ``linear``.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import TokenReader
from rice_eval.datasets.base import Annotation
from rice_eval.errors import DataError
from rice_eval.metrics.iou import scores
from rice_eval.probes.gram import GramSums, lda, ridge
from rice_eval.probes.linear import LinearMap
from rice_eval.probes.targets import SparseTargets, TargetStore, token_areas
from rice_eval.protocols.base import Context, Head, Outcome
from rice_eval.protocols.labels import FewLabels, share_of
from rice_eval.protocols.segmentation import (
    LAYER_SETS,
    HeadTest,
    LayerSet,
    Scorer,
    TrainPass,
    check_choice,
    held_out,
    joined,
    layers_of,
)

__all__ = ["GramLDA", "GramRidge"]


@dataclass(frozen=True)
class _Gram(FewLabels):
    """A closed-form probe.

    One pass over train adds up class weights, class sums and second moments in ``folds`` parts. Strength and layer are chosen
    by cross-validation over those parts (mIoU with nearest-neighbour upsampling, areas of all folds added up), the head
    then comes from the sums of all.

    Attributes:
        layer_set: ``last``, ``last4``, ``quarters`` or ``all``.
        folds: parts of the training images, split by a seeded shuffle.
        labels: see ``FewLabels``.
        seed: of the split.
    """

    kind: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"semantic"})
    metric: ClassVar[str] = "miou"

    layer_set: LayerSet = "last"
    folds: int = 5

    def __post_init__(self) -> None:
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        share_of(self.labels)
        if self.folds < 2:
            raise ValueError("folds are at least 2")
        if not self.strengths or not all(s > 0 for s in self.strengths):
            raise ValueError("strengths and shrinkages are positive, and there is at least one")

    @property
    @abstractmethod
    def strengths(self) -> tuple[float, ...]:
        """The swept hyper-parameter's values."""

    @property
    @abstractmethod
    def strength_name(self) -> str:
        """What a head's settings call it."""

    @abstractmethod
    def solve(self, sums: GramSums, strengths: Sequence[float]) -> list[LinearMap]:
        """The heads at each strength."""

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set``."""
        return layers_of(self.layer_set, facts)

    def needs_bank(self, facts: EncoderFacts) -> bool:
        """A choice among several heads reads every fold once more, to score its pixels."""
        return len(self.layers(facts)) * len(self.strengths) > 1

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        context, notes = self.labelled(context)
        layers = self.layers(context.facts)
        classes = len(context.train.classes)
        grid = tuple((layer, s) for layer in layers for s in self.strengths)
        source = context.tokens("train", self.view)
        indices = source.indices
        fold_of = self._fold_of(indices) if len(grid) > 1 else dict.fromkeys(indices, 0)
        folds = max(fold_of.values(), default=0) + 1
        train = _TrainPass(layers, context, fold_of, folds, context.progress("sums", len(indices)))
        source.consume(train)
        start = time.perf_counter()
        whole = {layer: _total(train.sums[layer]) for layer in layers}
        if not whole[layers[0]].n.sum() > 0:
            raise DataError(f"dataset '{context.train.name}': no training image has a labelled pixel")
        heads: tuple[Head, ...] = ()
        best = 0
        if len(grid) > 1:
            areas = np.zeros((len(grid), 3, classes))
            advance = context.progress("cross-validation", len(indices))
            for fold in range(folds):
                members = [i for i in indices if fold_of[i] == fold]
                maps = {layer: self.solve(whole[layer] - train.sums[layer][fold], self.strengths) for layer in layers}
                areas += _fold_areas(maps, members, source.reader(), train.stores, classes, advance)
            marks = scores(areas)["miou"]
            heads = tuple(Head(self._named(*g), float(m)) for g, m in zip(grid, marks))
            best = int(np.argmax(np.nan_to_num(marks, nan=-1.0)))
        layer, strength = grid[best]
        head = self.solve(whole[layer], (strength,))[0]
        fitted = time.perf_counter()
        test = context.tokens("test", self.view)
        scorer = Scorer(context.test, test.indices, context.panels, context.keep_predictions)
        consumer = HeadTest(head, layer, scorer, context.progress("predict", len(test.indices)))
        test.consume(consumer)
        return Outcome(
            statistics=scorer.statistics(),
            chosen=self._named(layer, strength),
            layers=(layer,),
            heads=heads or (Head(self._named(layer, strength), None),),
            seconds={"sums": train.seconds, "fit": fitted - start, "predict": consumer.seconds},
            panels=tuple(scorer.panels),
            warnings=(*notes, *scorer.warnings()),
            predictions=scorer.predictions,
        )

    def _named(self, layer: int, strength: float) -> dict[str, float | int]:
        return {"layer": layer, self.strength_name: strength}

    def _fold_of(self, indices: Sequence[int]) -> dict[int, int]:
        held_out(indices, 0.5, self.seed)  # refuses splits too small to choose on
        order = np.random.default_rng(self.seed).permutation(len(indices))
        return {indices[int(k)]: place % self.folds for place, k in enumerate(order)}


@dataclass(frozen=True)
class GramLDA(_Gram):
    """Linear discriminant analysis on tokens; see ``rice_eval.probes.gram.lda``.

    Attributes:
        shrinkages: strengths tried, each in (0, 1].
        prior: whether frequent classes are favoured; without, mIoU is better (every class counts the same in it).
    """

    id: ClassVar[str] = "gram-lda"

    shrinkages: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    prior: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(s > 1 for s in self.shrinkages):
            raise ValueError("shrinkages are in (0, 1]")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The shrinkages."""
        return self.shrinkages

    @property
    def strength_name(self) -> str:
        """``shrinkage``."""
        return "shrinkage"

    def solve(self, sums: GramSums, strengths: Sequence[float]) -> list[LinearMap]:
        """See ``_Gram.solve``."""
        return lda(sums, strengths, self.prior)


@dataclass(frozen=True)
class GramRidge(_Gram):
    """Ridge regression of class shares on tokens; see ``rice_eval.probes.gram.ridge``.

    Attributes:
        penalties: strengths tried, relative to the features' variance.
    """

    id: ClassVar[str] = "gram-ridge"

    penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The penalties."""
        return self.penalties

    @property
    def strength_name(self) -> str:
        """``penalty``."""
        return "penalty"

    def solve(self, sums: GramSums, strengths: Sequence[float]) -> list[LinearMap]:
        """See ``_Gram.solve``."""
        return ridge(sums, strengths)


def _total(parts: Sequence[GramSums]) -> GramSums:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class _TrainPass(TrainPass):
    """Sums of each layer and fold."""

    def __init__(
        self,
        layers: Sequence[int],
        context: Context,
        fold_of: dict[int, int],
        folds: int,
        advance: Callable[[int], None],
    ) -> None:
        super().__init__(layers, context.facts, advance)
        self._classes = len(context.train.classes)
        device, widths = context.device, context.facts.widths
        self.sums = {
            layer: [GramSums.zeros(self._classes, widths[layer - 1], device) for _ in range(folds)] for layer in layers
        }
        self._fold_of = fold_of

    def take(self, index: int, layer: int, patches: Tensor, targets: SparseTargets) -> None:
        """See ``TrainPass.take``. Every labelled pixel weighs the same."""
        self.sums[layer][self._fold_of[index]].add(patches, targets.dense(self._classes))


def _fold_areas(
    maps: dict[int, list[LinearMap]],
    members: Sequence[int],
    reader: TokenReader,
    stores: Mapping[int, TargetStore],
    classes: int,
    advance: Callable[[int], None],
) -> NDArray[np.float64]:
    """``(G, 3, C)`` areas of every head on one fold, layer by layer in the order of ``maps``."""
    stacked = {
        layer: LinearMap(torch.cat([h.weight for h in heads], dim=1), torch.cat([h.bias for h in heads]))
        for layer, heads in maps.items()
    }
    areas = {layer: torch.zeros(len(heads), 3, classes, dtype=torch.float64) for layer, heads in maps.items()}
    for index in members:
        image = reader[index]
        for layer, head in stacked.items():
            tokens = joined(image.patches[layer])
            predicted = head(tokens).view(len(tokens), -1, classes).argmax(dim=-1)
            areas[layer] += token_areas(predicted, stores[layer][index].dense(classes).to(predicted.device)).cpu()
        advance(1)
    return torch.cat([areas[layer] for layer in maps]).numpy()
