"""Protocols ``capi-knn`` and ``hummingbird-knn``: labels of a patch's nearest training patches, on banked tokens."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import TokenReader
from rice_eval.datasets.base import IGNORE, Annotation, Dataset
from rice_eval.errors import DataError
from rice_eval.metrics.iou import areas_of, confusion, scores
from rice_eval.probes.knn import Metric, attend, nearest, vote
from rice_eval.probes.targets import SparseTargets
from rice_eval.protocols.base import Context, Head, Outcome, Protocol
from rice_eval.protocols.segmentation import Scorer, TrainPass, check_choice, checked_labels, held_out, label_map
from rice_eval.protocols.segmentation_rows import PatchLabels, TokenRows, from_patches, majority

__all__ = ["CapiKnn", "HummingbirdKnn"]

_METRICS: tuple[Metric, ...] = ("cosine", "l2", "dot")


@dataclass(frozen=True)
class CapiKnn(Protocol):
    """CAPI's kNN segmentation (arXiv 2502.08769; ``eval_segmentation.py``).

    Images squashed to one size, features of the last block standardised by the training part, every pixel of a patch predicted as
    the most frequent label of the same pixel of the k nearest training patches. Neighbours and distance are chosen on
    held-out training images, the search then runs over all of them (standardised as before, as in its code). Scored at the view's
    size with nearest labels. Patches that are mostly unlabelled are left out of the search; an unlabelled pixel of a
    neighbour has no vote (in its code "unlabelled" can win the vote, and is then always wrong).

    Attributes:
        ks, metrics: the sweep; ``metrics`` of ``cosine``, ``l2``, ``dot``.
        holdout: share of the training images held out for the choice.
        seed: of the split.
    """

    id: ClassVar[str] = "capi-knn"
    kind: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"semantic"})
    metric: ClassVar[str] = "miou"
    rereads: ClassVar[bool] = True

    view: str = "square=224"
    ks: tuple[int, ...] = (1, 3, 10, 30)
    metrics: tuple[str, ...] = ("cosine", "l2")
    holdout: float = 0.1

    def __post_init__(self) -> None:
        for metric in self.metrics:
            check_choice("metrics", metric, _METRICS)
        if not self.ks or not self.metrics or min(self.ks) < 1 or not 0 < self.holdout < 1:
            raise ValueError("ks and metrics need at least one value each, ks are at least 1, holdout is in (0, 1)")

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        layer, classes = context.facts.layers, len(context.train.classes)
        grid = tuple((metric, k) for metric in self.metrics for k in self.ks)
        source = context.tokens("train", self.view)
        indices = source.indices
        fit, held = held_out(indices, self.holdout, self.seed) if len(grid) > 1 else (indices, ())
        labels = PatchLabels(layer, context.facts.widths[layer - 1], held, context.progress("labels", len(indices)))
        source.consume(labels)
        start = time.perf_counter()
        mean, scale = labels.moments.standardisation(1e-12)

        def change(tokens: Tensor) -> Tensor:
            return (tokens - mean) * scale

        reader = source.reader()
        heads: tuple[Head, ...] = ()
        best = 0
        if len(grid) > 1:
            keys = _Keys(reader, layer, fit, labels, classes, change, context.train)
            queries = TokenRows(reader, layer, held, change)
            areas = np.zeros((len(grid), 3, classes))
            for m, metric in enumerate(self.metrics):
                found = keys.search(queries, max(self.ks), metric, context.device)
                for index, rows in found:
                    for n, predicted in enumerate(vote(keys.labels(rows), self.ks, classes, IGNORE).items()):
                        matrix = confusion(predicted[1].numpy(), labels[index].numpy(), classes, IGNORE)
                        areas[m * len(self.ks) + n] += areas_of(matrix)
            marks = scores(areas)["miou"]
            heads = tuple(Head({"metric": g[0], "k": g[1]}, float(s)) for g, s in zip(grid, marks))
            best = int(np.argmax(np.nan_to_num(marks, nan=-1.0)))
        metric, k = grid[best]
        chosen = {"metric": metric, "k": k}
        keys = _Keys(reader, layer, indices, labels, classes, change, context.train)
        fitted = time.perf_counter()
        test = context.tokens("test", self.view)
        test_reader = test.reader()
        scorer = Scorer(context.test, test.indices, context.panels, context.keep_predictions)
        advance = context.progress("predict", len(test.indices))
        queries = TokenRows(test_reader, layer, test.indices, change)
        begun = time.perf_counter()
        for index, rows in keys.search(queries, k, metric, context.device):
            tokens = test_reader[index]
            frame = tokens.frames[0]
            winners = vote(keys.labels(rows), (k,), classes, IGNORE)[k]
            truth = frame.mask(checked_labels(context.test, index), IGNORE).astype(np.int16)
            scorer.add(index, truth, from_patches(winners, tokens.grids[layer][0], frame))
            advance(1)
        return Outcome(
            statistics=scorer.statistics(),
            chosen=chosen,
            layers=(layer,),
            heads=heads or (Head(chosen, None),),
            seconds={"fit": fitted - start, "predict": time.perf_counter() - begun},
            panels=tuple(scorer.panels),
            warnings=scorer.warnings(),
            predictions=scorer.predictions,
        )


class _Keys:
    """Rows to search among, and the pixel labels of each in an unnamed temporary file."""

    def __init__(
        self,
        reader: TokenReader,
        layer: int,
        indices: Sequence[int],
        labels: PatchLabels,
        classes: int,
        change: Callable[[Tensor], Tensor],
        dataset: Dataset,
    ) -> None:
        keep = {index: majority(labels[index], classes) != IGNORE for index in indices}
        self.count = sum(int(k.sum()) for k in keep.values())
        if not self.count:
            raise DataError(f"dataset '{dataset.name}': no training patch is labelled for the most part")
        self._rows = TokenRows(reader, layer, indices, change, keep.__getitem__)
        self._file = tempfile.TemporaryFile(prefix="rice-eval-keys-")  # noqa: SIM115  (lives as long as this)
        pixels = 0
        for index in indices:
            kept = labels[index][keep[index]]
            pixels = kept.shape[1]
            self._file.write(kept.to(torch.int16).numpy().tobytes())
        self._file.flush()
        self._labels: NDArray[np.int16] = np.memmap(self._file, np.int16, "r", shape=(self.count, pixels))

    def search(self, queries: TokenRows, k: int, metric: str, device: torch.device) -> list[tuple[int, Tensor]]:
        """For each image of the queries, ``(N, k)`` rows of its tokens' neighbours."""
        counts = [len(queries.image(index)) for index in queries.indices]
        known = next(m for m in _METRICS if m == metric)
        rows = nearest(queries, self._rows, sum(counts), min(k, self.count), known, device)[1]
        return list(zip(queries.indices, torch.split(rows, counts)))

    def labels(self, rows: Tensor) -> Tensor:
        """``(N, k)`` rows to ``(N, k, P)`` int64 labels."""
        return torch.from_numpy(self._labels[rows.numpy()].astype(np.int64))


@dataclass(frozen=True)
class HummingbirdKnn(Protocol):
    """Dense retrieval of "Towards In-context Scene Understanding" (arXiv 2306.01667), as open-hummingbird-eval runs it.

    A memory of L2-normalised patch features with the shares of each class in their patches; a query's label shares are its k
    nearest ones' by cosine, weighted by a softmax; they are upsampled bilinearly to the view. Where the memory is smaller than
    the training set, each image gives the same number of patches, those with rare classes (within the image) first, at random.
    Scored at the view's size. Unlabelled pixels are left out of a patch's shares (its code counts them as class 0), and patches
    without labels out of the memory. No augmentation epochs: features come from the bank.

    Attributes:
        memory: patches remembered.
        k: neighbours.
        temperature: beta of the softmax.
        seed: of the draw.
    """

    id: ClassVar[str] = "hummingbird-knn"
    kind: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"semantic"})
    metric: ClassVar[str] = "miou"
    rereads: ClassVar[bool] = True

    view: str = "square=36p,interp=bilinear"
    memory: int = 102_400
    k: int = 30
    temperature: float = 0.02

    def __post_init__(self) -> None:
        if min(self.memory, self.k) < 1 or not self.temperature > 0:
            raise ValueError("memory and k are at least 1, temperature is positive")

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``. The settings are the protocol's: nothing is held out and nothing chosen."""
        layer, classes = context.facts.layers, len(context.train.classes)
        source = context.tokens("train", self.view)
        each = max(1, self.memory // max(1, len(source.indices)))
        memory = _Memory(
            layer, context.facts, each, classes, self.seed, context.progress("memory", len(source.indices))
        )
        source.consume(memory)
        if not memory.labels:
            raise DataError(f"dataset '{context.train.name}': no training image has a labelled pixel")
        features, shares = torch.cat(memory.features).float(), torch.cat(memory.labels)
        test = context.tokens("test", self.view)
        reader = test.reader()
        scorer = Scorer(context.test, test.indices, context.panels, context.keep_predictions)
        advance = context.progress("predict", len(test.indices))
        begun = time.perf_counter()
        for index in test.indices:
            tokens = reader[index]
            frame, (h, w) = tokens.frames[0], tokens.grids[layer][0]
            queries = F.normalize(tokens.patches[layer][0].float(), dim=1)
            near, rows = nearest(
                _once(queries), _once(features), len(queries), min(self.k, len(features)), "dot", context.device
            )
            found = attend(near, shares[rows], self.temperature)
            prediction = label_map(found.T.reshape(classes, h, w), frame.size).numpy()
            truth = frame.mask(checked_labels(context.test, index), IGNORE).astype(np.int16)
            scorer.add(index, truth, prediction)
            advance(1)
        settings: Mapping[str, float | int] = {"k": self.k, "temperature": self.temperature, "memory": len(features)}
        return Outcome(
            statistics=scorer.statistics(),
            chosen=dict(settings),
            layers=(layer,),
            heads=(Head(dict(settings), None),),
            seconds={"fit": memory.seconds, "predict": time.perf_counter() - begun},
            panels=tuple(scorer.panels),
            warnings=scorer.warnings(),
            predictions=scorer.predictions,
        )


def _once(rows: Tensor) -> Callable[[], list[tuple[int, Tensor]]]:
    return lambda: [(0, rows)]


class _Memory(TrainPass):
    """Normalised features and label shares of the patches that are remembered."""

    def __init__(
        self, layer: int, facts: EncoderFacts, each: int, classes: int, seed: int, advance: Callable[[int], None]
    ) -> None:
        super().__init__((layer,), facts, advance)
        self._each, self._classes, self._seed = each, classes, seed
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []

    def take(self, index: int, layer: int, patches: Tensor, targets: SparseTargets) -> None:
        """See ``TrainPass.take``."""
        counts = targets.dense(self._classes)
        rows = torch.nonzero(counts.sum(dim=1) > 0)[:, 0]
        if not len(rows):
            return
        counts = counts[rows]
        present = (counts > 0).float()
        frequency = present.sum(dim=0)  # patches of this image that show each class
        draw = torch.rand(len(rows), generator=torch.Generator().manual_seed(self._seed * 1_000_003 + index))
        order = (present @ frequency * draw).argsort()[: self._each]
        self.features.append(F.normalize(patches[rows[order]].float(), dim=1).half())
        self.labels.append((counts / counts.sum(dim=1, keepdim=True))[order])
