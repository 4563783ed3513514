"""Protocol ``attn-probe``: one cross-attention layer with position queries reads a crop, all characters at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import ImageTokens, TokenReader
from rice_eval.datasets.base import Annotation, Dataset
from rice_eval.datasets.text_crops import TextCrops
from rice_eval.probes.linear import Moments, warmup_cosine
from rice_eval.probes.reading import AttentiveReader
from rice_eval.protocols.base import Context, Head, Outcome, Protocol
from rice_eval.protocols.ocr_lines import (
    LineScorer,
    check_lines,
    columns,
    crops_of,
    need_lines,
    remarks,
    unspellable,
)
from rice_eval.protocols.ocr_training import ReadsLines, Rider, TrainingLines
from rice_eval.protocols.segmentation import LAYER_SETS, LayerSet, check_choice, check_optimiser, layers_of

__all__ = ["AttnProbe"]


@dataclass(frozen=True)
class AttnProbe(Protocol):
    """Reading crops with one cross-attention: keys and values are linear maps of frozen tokens, a learned query a position.

    Unlike ``ctc-linear`` it may look at all tokens for every character, so tokens need not stand in reading order; like it,
    it has no language model. Readers of all layers and rates train on the same batches; the best on held-out training images
    by 1-NED is trained again on all.

    Attributes:
        height, margin, max_aspect, charset: see ``ctc-linear``.
        length: longest text in characters; longer ones are cut in training, counted in a warning, and never read whole.
        width: of queries, keys and values.
        layer_set: ``last``, ``last4``, ``quarters`` or ``all``.
        lrs, wd: AdamW's learning rates and weight decay.
        steps, batch, warmup: see ``ctc-linear``.
        holdout: share of the training images held out.
    """

    id: ClassVar[str] = "attn-probe"
    kind: ClassVar[str] = "ocr"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"text"})
    metric: ClassVar[str] = "one_minus_ned"
    rereads: ClassVar[bool] = True

    view: str = "native,pad=patch"
    height: int = 56
    margin: float = 0.15
    max_aspect: float = 32.0
    charset: str = "ascii"
    length: int = 32
    width: int = 128
    layer_set: LayerSet = "quarters"
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    wd: float = 1e-2
    steps: int = 1500
    batch: int = 64
    warmup: float = 0.1
    holdout: float = 0.1

    def __post_init__(self) -> None:
        check_choice("layer_set", self.layer_set, LAYER_SETS)
        check_lines(self.charset, "mean", "fit", self.height, self.margin, self.max_aspect)
        if min(self.length, self.width // 2, self.steps, self.batch) < 1 or not self.lrs:
            raise ValueError("length, steps and batch are at least 1, width at least 2, and lrs needs a value")
        check_optimiser(self.lrs, (self.wd,))
        if not 0 <= self.warmup < 1 or not 0 < self.holdout < 1:
            raise ValueError("warmup is in [0, 1) and holdout in (0, 1)")

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers of ``layer_set``."""
        return layers_of(self.layer_set, facts)

    def views(self) -> Mapping[str, Sequence[str]]:
        """Crops of both splits."""
        return {"train/crops": (self.view,), "test/crops": (self.view,)}

    def part(self, name: str, dataset: Dataset) -> TextCrops:
        """``crops``: those of ``ctc-linear``."""
        if name != "crops":
            raise KeyError(f"protocol '{self.id}' derives nothing named '{name}'")
        return crops_of(dataset, self.height, "fit", self.margin, self.max_aspect)

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        layers = self.layers(context.facts)
        crops, test_crops = self.part("crops", context.train), self.part("crops", context.test)
        need_lines(test_crops, "test")
        source = context.tokens("train/crops", self.view)
        indices = source.indices
        grid = tuple((layer, lr) for layer in layers for lr in self.lrs)
        lines = TrainingLines.of(crops, indices, self.charset, len(grid) > 1, self.holdout, self.seed)
        sums = _Sums(layers, context.facts, context.progress("lines", len(indices)))
        source.consume(sums)
        start = time.perf_counter()
        reader = source.reader()
        marks: list[float] = []
        if len(grid) > 1:
            heads = self._train(context, grid, sums.moments, reader, lines, lines.fit, "sweep")
            for (layer, _), head in zip(grid, heads):
                readings = [lines.charset.decode(_read(head, reader[i], layer, crops)) for i in lines.held]
                marks.append(lines.mark(readings))
        layer, lr = grid[int(np.argmax(marks))] if marks else grid[0]
        head = self._train(context, ((layer, lr),), sums.moments, reader, lines, indices, "refit")[0]
        fitted = time.perf_counter() - start
        test = context.tokens("test/crops", self.view)
        scorer = LineScorer(test_crops, context.panels, context.keep_predictions)

        def read(tokens: ImageTokens) -> str:
            return lines.charset.decode(_read(head, tokens, layer, test_crops))

        reading = ReadsLines(read, scorer, context.progress("read", len(test.indices)))
        test.consume(reading)
        statistics, panels, kept = scorer.finish()
        notes = [*lines.notes(), *remarks(test_crops, "test"), *unspellable(test_crops, lines.charset)]
        long = sum(len(t) > self.length for t in lines.targets.values())
        if long:
            notes.append(f"train: {long} of {len(indices)} lines are longer than {self.length} characters and were cut")
        return Outcome(
            statistics=statistics,
            chosen={"layer": layer, "lr": lr},
            layers=(layer,),
            heads=tuple(Head({"layer": g[0], "lr": g[1]}, m) for g, m in zip(grid, marks))
            or (Head({"layer": layer, "lr": lr}, None),),
            seconds={"targets": sums.seconds, "fit": fitted, "predict": reading.seconds},
            panels=panels,
            warnings=tuple(notes),
            predictions=kept,
        )

    def _train(
        self,
        context: Context,
        grid: Sequence[tuple[int, float]],
        moments: Mapping[int, Moments],
        reader: TokenReader,
        lines: TrainingLines,
        indices: Sequence[int],
        label: str,
    ) -> list[AttentiveReader]:
        """One reader a (layer, rate), trained on the same batches."""
        heads, optimisers = [], []
        for layer, lr in grid:
            torch.manual_seed(self.seed)  # readers of one width start alike
            head = AttentiveReader(
                *moments[layer].standardisation(1e-6), lines.charset.classes, self.length, self.width
            ).to(context.device)
            heads.append(head)
            optimisers.append(torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=self.wd))
        rng = np.random.default_rng(self.seed)
        advance = context.progress(label, self.steps)
        warmup = round(self.warmup * self.steps)
        for step in range(self.steps):
            batch = [indices[k] for k in rng.integers(len(indices), size=min(self.batch, len(indices)))]
            images = [reader[i] for i in batch]
            wanted = AttentiveReader.targets([lines.targets[i] for i in batch], self.length).to(context.device)
            for layer in dict.fromkeys(layer for layer, _ in grid):
                tokens, places, valid = (t.to(context.device) for t in _padded(images, batch, layer, lines.crops))
                for (mine, lr), head, optimiser in zip(grid, heads, optimisers):
                    if mine != layer:
                        continue
                    for group in optimiser.param_groups:
                        group["lr"] = lr * warmup_cosine(step, self.steps, warmup)
                    logits = head(tokens, places, valid)
                    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
            advance(1)
        return [head.eval() for head in heads]


def _kept(image: ImageTokens, index: int, layer: int, crops: TextCrops) -> tuple[Tensor, Tensor]:
    """``(N, D)`` tokens of the columns that show the line, and ``(N,)`` their places along it."""
    h, w = image.grids[layer][0]
    count = columns((h, w), image.frames[0], crops.content_width(index))
    tokens = image.patches[layer][0].view(h, w, -1)[:, :count].reshape(h * count, -1).float()
    return tokens, ((torch.arange(count) + 0.5) / count).repeat(h)


def _padded(
    images: Sequence[ImageTokens], indices: Sequence[int], layer: int, crops: TextCrops
) -> tuple[Tensor, Tensor, Tensor]:
    parts = [_kept(image, index, layer, crops) for image, index in zip(images, indices)]
    tokens = torch.nn.utils.rnn.pad_sequence([t for t, _ in parts], batch_first=True)
    places = torch.nn.utils.rnn.pad_sequence([p for _, p in parts], batch_first=True)
    sizes = torch.tensor([len(p) for _, p in parts])
    return tokens, places, torch.arange(tokens.shape[1])[None] < sizes[:, None]


@torch.no_grad()
def _read(head: AttentiveReader, image: ImageTokens, layer: int, crops: TextCrops) -> list[int]:
    device = head.mean.device
    tokens, places, valid = _padded([image], [image.index], layer, crops)
    return AttentiveReader.decode(head(tokens.to(device), places.to(device), valid.to(device))[0])


class _Sums(Rider):
    def __init__(self, layers: Sequence[int], facts: EncoderFacts, advance: Callable[[int], None]) -> None:
        super().__init__(advance)
        self.moments = {layer: Moments(facts.widths[layer - 1]) for layer in layers}

    def take(self, tokens: ImageTokens) -> None:
        for layer, moments in self.moments.items():
            moments.add(tokens.patches[layer][0])
