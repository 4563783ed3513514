"""Protocol ``capi-logreg``: logistic regression of each patch's majority label, by L-BFGS, on banked tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rice_eval.datasets.base import IGNORE, Annotation
from rice_eval.errors import DataError
from rice_eval.metrics.iou import areas_of, confusion, scores
from rice_eval.probes.lbfgs import Minimum, minimise
from rice_eval.probes.linear import LinearMap
from rice_eval.protocols.base import Context, Head, Outcome, Protocol
from rice_eval.protocols.segmentation import Scorer, checked_labels, held_out
from rice_eval.protocols.segmentation_rows import PatchLabels, TokenRows, from_patches, majority

__all__ = ["CapiLogreg"]


@dataclass(frozen=True)
class CapiLogreg(Protocol):
    """CAPI's logistic regression (arXiv 2502.08769; ``eval_segmentation.py``).

    Standardised features of the last block, the majority label of each patch, an L2 penalty on the weights (not on the
    intercept), C chosen on held-out training images, a last fit on all of them; every pixel of a patch gets the patch's class.
    All values of C are fitted side by side on the same passes over the tokens. Its code asks cuML for a tolerance of 1e-12, which
    float32 can't reach and so means ``max_iter`` steps; here a problem also ends where no step helps any more.

    Attributes:
        cs: inverse strengths of the penalty: the objective is C times the summed cross-entropy plus half the squared norm.
        max_iter: steps at most.
        tol: largest entry of the gradient (of the objective over C times the number of patches) at which a fit ends.
        history: pairs that L-BFGS remembers.
        linesearch: halvings of a step at most.
        holdout: share of the training images held out for the choice.
        seed: of the split.
    """

    id: ClassVar[str] = "capi-logreg"
    kind: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"semantic"})
    metric: ClassVar[str] = "miou"
    rereads: ClassVar[bool] = True

    view: str = "square=224"
    cs: tuple[float, ...] = tuple(float(10.0**e) for e in np.linspace(-6, 5, 8))
    max_iter: int = 1000
    tol: float = 1e-7
    history: int = 5
    linesearch: int = 50
    holdout: float = 0.1

    def __post_init__(self) -> None:
        if not self.cs or min(self.cs) <= 0 or not 0 < self.holdout < 1 or self.tol < 0:
            raise ValueError("cs are positive and there is at least one, holdout is in (0, 1), tol is not negative")
        if min(self.max_iter, self.history, self.linesearch) < 1:
            raise ValueError("max_iter, history and linesearch are at least 1")

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        layer, classes = context.facts.layers, len(context.train.classes)
        source = context.tokens("train", self.view)
        indices = source.indices
        fit, held = held_out(indices, self.holdout, self.seed) if len(self.cs) > 1 else (indices, ())
        labels = PatchLabels(layer, context.facts.widths[layer - 1], held, context.progress("labels", len(indices)))
        source.consume(labels)
        start = time.perf_counter()
        mean, scale = labels.moments.standardisation(1e-12)
        reader = source.reader()

        def rows(part: Sequence[int]) -> _Data:
            majorities = {index: majority(labels[index], classes) for index in part}
            keep = {index: m != IGNORE for index, m in majorities.items()}
            kept = torch.cat([m[keep[i]] for i, m in majorities.items()])
            if not len(kept):
                raise DataError(f"dataset '{context.train.name}': no training patch is labelled for the most part")
            tokens = TokenRows(reader, layer, part, lambda t: (t - mean) * scale, keep.__getitem__)
            return _Data(tokens, kept, classes, context.device)

        notes: list[str] = []
        heads: tuple[Head, ...] = ()
        best = 0
        if len(self.cs) > 1:
            maps, end = self._fit(rows(fit), self.cs, mean, scale, context.progress("sweep", self.max_iter))
            notes += self._notes(self.cs, end)
            areas = np.zeros((len(self.cs), 3, classes))
            for index in held:
                tokens = reader[index].patches[layer][0]
                truth = labels[index].numpy()
                for n, head in enumerate(maps):
                    predicted = head(tokens).argmax(dim=1).cpu().numpy()[:, None].repeat(truth.shape[1], axis=1)
                    areas[n] += areas_of(confusion(predicted, truth, classes, IGNORE))
            marks = scores(areas)["miou"]
            heads = tuple(Head({"C": c}, float(m)) for c, m in zip(self.cs, marks))
            best = int(np.argmax(np.nan_to_num(marks, nan=-1.0)))
        chosen = {"C": self.cs[best]}
        (head,), end = self._fit(rows(indices), (self.cs[best],), mean, scale, context.progress("fit", self.max_iter))
        notes += self._notes((self.cs[best],), end)
        fitted = time.perf_counter()
        test = context.tokens("test", self.view)
        test_reader = test.reader()
        begun = time.perf_counter()
        scorer = Scorer(context.test, test.indices, context.panels, context.keep_predictions)
        advance = context.progress("predict", len(test.indices))
        for index in test.indices:
            found = test_reader[index]
            frame, (h, w) = found.frames[0], found.grids[layer][0]
            pixels = (frame.size[0] // h) * (frame.size[1] // w)
            winners = head(found.patches[layer][0]).argmax(dim=1).cpu()[:, None].expand(-1, pixels)
            truth = frame.mask(checked_labels(context.test, index), IGNORE).astype(np.int16)
            scorer.add(index, truth, from_patches(winners.contiguous(), (h, w), frame))
            advance(1)
        return Outcome(
            statistics=scorer.statistics(),
            chosen=chosen,
            layers=(layer,),
            heads=heads or (Head(chosen, None),),
            seconds={"fit": fitted - start, "predict": time.perf_counter() - begun},
            panels=tuple(scorer.panels),
            warnings=(*dict.fromkeys(notes), *scorer.warnings()),
            predictions=scorer.predictions,
        )

    def _fit(
        self, data: _Data, cs: Sequence[float], mean: Tensor, scale: Tensor, tell: Callable[[int], None]
    ) -> tuple[list[LinearMap], Minimum]:
        weight = 1 / (torch.tensor(cs, dtype=torch.float64) * len(data.labels))
        start = torch.zeros(len(cs), (len(mean) + 1) * data.classes, dtype=torch.float64)
        end = minimise(
            lambda points, problems: data.objective(points, weight[problems]),
            start,
            steps=self.max_iter,
            tolerance=self.tol,
            memory=self.history,
            trials=self.linesearch,
            tell=tell,
        )
        maps = []
        for point in end.points.view(len(cs), len(mean) + 1, data.classes).float():
            folded = point[:-1] * scale[:, None]
            maps.append(LinearMap(folded.to(data.device), (point[-1] - mean @ folded).to(data.device)))
        return maps, end

    def _notes(self, cs: Sequence[float], end: Minimum) -> list[str]:
        late = [f"{c:.3g}" for c, done in zip(cs, end.converged.tolist()) if not done]
        return (
            [f"logistic regression had not converged after {self.max_iter} steps at C = {', '.join(late)}"]
            if late
            else []
        )


class _Data:
    """Standardised rows with their labels, and the objective over them."""

    def __init__(self, rows: TokenRows, labels: Tensor, classes: int, device: torch.device) -> None:
        self._rows, self.labels, self.classes, self.device = rows, labels, classes, device
        dim = rows.image(rows.indices[0]).shape[1]
        # Small sets are kept in memory; larger ones are read from the bank again at every step.
        self._kept = list(rows()) if len(labels) * dim * 4 <= 1 << 30 else None

    def objective(self, points: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy plus ``penalty / 2`` times the squared norm of the weights.

        Args:
            points: ``(A, (D + 1) * C)`` float64, the last row of each the intercepts.
            penalty: ``(A,)``.

        Returns:
            ``(A,)`` values and their gradients.
        """
        heads = len(points)
        table = points.view(heads, -1, self.classes)
        weight = table[:, :-1].permute(1, 0, 2).reshape(-1, heads * self.classes).float().to(self.device)
        bias = table[:, -1].reshape(-1).float().to(self.device)
        value = torch.zeros(heads, dtype=torch.float64)
        gradient = torch.zeros(weight.shape[0] + 1, heads * self.classes, dtype=torch.float64)
        for first, piece in self._kept if self._kept is not None else self._rows():
            for start in range(0, len(piece), 4096):
                x = piece[start : start + 4096].to(self.device)
                y = self.labels[first + start : first + start + len(x)].to(self.device)
                log_p = torch.log_softmax(torch.addmm(bias, x, weight).view(len(x), heads, self.classes), dim=-1)
                truth = F.one_hot(y, self.classes).float()
                value -= torch.einsum("thc,tc->h", log_p, truth).double().cpu()
                residual = log_p.exp_().sub_(truth[:, None, :]).view(len(x), -1)
                gradient[:-1] += (x.T @ residual).double().cpu()
                gradient[-1] += residual.sum(dim=0).double().cpu()
        count = len(self.labels)
        out = gradient.view(-1, heads, self.classes).permute(1, 0, 2) / count
        out[:, :-1] += penalty[:, None, None] * table[:, :-1]
        value = value / count + 0.5 * penalty * table[:, :-1].square().sum(dim=(1, 2))
        return value, out.reshape(heads, -1)
