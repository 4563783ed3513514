"""Protocol ``perception-probe``: what a small frozen language model can be told of an image through one trained projector."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rice_eval import __version__
from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import TokenReader
from rice_eval.datasets.base import Annotation
from rice_eval.errors import PlanError
from rice_eval.mllm.lm_identity import lm_identity
from rice_eval.mllm.sizes import MOST_PROMPT, MOST_SIDE, MOST_WIDTH
from rice_eval.probes.training_state import TrainingState
from rice_eval.protocols.base import Context, Outcome, Protocol
from rice_eval.views import Frame, View

if TYPE_CHECKING:
    from rice_eval.mllm.align import Region
    from rice_eval.mllm.lm import LanguageModel
    from rice_eval.mllm.probe import PooledProjector

__all__ = ["PerceptionProbe"]

_BOUNDS = {
    "blocks": (1, 1000),
    "side": (1, MOST_SIDE),
    "hidden": (1, MOST_WIDTH),
    "prompt": (0, MOST_PROMPT),
    "align_epochs": (0, 100_000),
    "align_lr": (1e-12, 1e3),
    "lr": (1e-12, 1e3),
    "prompt_lr": (1e-12, 1e3),
    "weight_decay": (0.0, 1e3),
    "batch": (1, 4096),
    "turns": (1, 1_000_000),
    "epochs": (1e-9, 1e6),
}
"""Least and most of every number: beyond them torch overflows, or a run never ends."""

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PerceptionProbe(Protocol):
    """A projector between a frozen encoder and a frozen language model, trained on banked tokens, judged on short answers.

    Tokens of the blocks at a quarter, a half, three quarters and the end of the depth stand side by side (as DINOv2's
    four-block linear probes do), are averaged onto ``side`` x ``side`` cells, and mapped to word embeddings by a two-layer MLP.
    That learns which words each cell lies on, from described regions. Then, with the language model reading along, a linear layer
    behind it and a few embeddings behind the image learn from questions about the training images, each asked alone: they
    make a grid of words a thing that the language model reads. Every question of the test split is asked three times: with the
    image, without it (``blind_…``), and with the training set's mean tokens in its place (``mean_image_…``).

    Attributes:
        lm: the language model (``rice_eval.mllm.lm.load_lm``); a hash over its files is part of the settings.
        blocks: how many blocks, evenly spread up to the last; 1 is the last alone.
        side: cells a side.
        hidden: width between the projector's layers.
        prompt: learned embeddings behind the cells.
        align_epochs, align_lr: of the alignment of image tokens with words, see ``rice_eval.mllm.align``; 0 epochs leave it out,
            and the whole projector learns with the language model.
        lr, prompt_lr, weight_decay, batch, epochs: AdamW with 3 % warm-up and half a cosine; batches count images.
        turns: questions about an image at most, drawn anew at every visit.
        train_dtype: of the frozen language model while the projector trains; it is tested in float32.
    """

    id: ClassVar[str] = "perception-probe"
    version: ClassVar[int] = 3  # questions asked alone; a reading layer and a prompt behind what was aligned
    kind: ClassVar[str] = "mllm"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"questions"})
    metric: ClassVar[str] = "accuracy"
    rereads: ClassVar[bool] = True
    tuned: ClassVar[tuple[str, ...]] = ("projector",)

    lm: str = "smollm2-135m"
    blocks: int = 4
    side: int = 7
    hidden: int = 1152
    prompt: int = 10
    align_epochs: int = 4
    align_lr: float = 1e-3
    lr: float = 1e-3
    prompt_lr: float = 0.03
    weight_decay: float = 0.0
    batch: int = 4
    turns: int = 8
    epochs: float = 2.0
    train_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}, not from {least:g} to {most:g}")
        if self.train_dtype not in _TYPES:
            raise ValueError(f"train_dtype '{self.train_dtype}' is neither float32 nor bfloat16")

    def settings(self) -> dict[str, Any]:
        """Every field, the language model's identity, and the parts that are tuned: all of it separates what is comparable."""
        return {**super().settings(), "lm_files": lm_identity(self.lm), "tuned": list(self.tuned)}

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """Blocks evenly spread up to the last; the last stage alone where stages have grids of their own."""
        if len(set(facts.strides)) > 1:
            return (facts.layers,)
        return tuple(sorted({max(1, round(facts.layers * (k + 1) / self.blocks)) for k in range(self.blocks)}))

    def run(self, context: Context) -> Outcome:
        """Train on train, ask test once."""
        from rice_eval.mllm.align import regions_of
        from rice_eval.mllm.bundle import assemble
        from rice_eval.mllm.lm import load_lm
        from rice_eval.mllm.probe import PooledProjector, fit, sha256_of
        from rice_eval.mllm.probe import Schedule as Rates
        from rice_eval.mllm.vqa import PROMPT, dialogues

        if View.parse(self.view).stride:
            raise PlanError(f"view '{self.view}' gives several windows", "choose one without slide, e.g. square=224")
        layers = self.layers(context.facts)
        start = time.perf_counter()
        device = str(context.device)
        trained_with = load_lm(self.lm, dtype=_TYPES[self.train_dtype], device=device)
        seconds = {"language model": time.perf_counter() - start}
        width = sum(context.facts.widths[layer - 1] for layer in layers)
        projector = PooledProjector(width, trained_with.width, self.side, self.hidden, self.prompt, self.seed)
        projector.to(context.device)
        mllm = assemble(context.encoder(), trained_with, projector, layers, self.norm, self.view)
        self._check_branches(mllm)
        start = time.perf_counter()
        frames: dict[int, Frame] = {}
        train = self._pooled(context, "train", layers, frames.__setitem__)
        told = dialogues(context.train, captions=False)
        said = [told[i] for i in train]
        regions = [regions_of(told[i].regions, frames[i]) for i in train]
        tokens = list(train.values())
        begins = trained_with.words(trained_with.tokenizer(PROMPT, add_special_tokens=False).input_ids)
        projector.start(tokens, trained_with.word_size(), begins)
        rates = Rates(self.lr, self.prompt_lr, self.weight_decay, self.batch, self.epochs, self.turns, self.seed)
        facts = {
            "encoder": context.facts.sha256,
            "train": context.train.fingerprint,
            "protocol": self.hash,
            "device": context.device.type,
        }
        state = TrainingState(context.scratch, "projector", facts)
        fitted = fit(
            mllm,
            tokens,
            said,
            rates,
            state,
            context.progress("projector", rates.steps(len(tokens))),
            begin=partial(self._align, context, projector, tokens, regions, trained_with),
            aligned=self.align_epochs > 0,
        )
        seconds["fit"] = time.perf_counter() - start
        del train, tokens, said
        start = time.perf_counter()
        if self.train_dtype != "float32":
            del mllm, trained_with
            tested_with = load_lm(self.lm, device=device)
            mllm = assemble(context.encoder(), tested_with, projector, layers, self.norm, self.view)
        seconds["language model"] += time.perf_counter() - start
        start = time.perf_counter()
        judged = self._judge(context, mllm, layers)
        seconds["predict"] = time.perf_counter() - start
        return Outcome(
            statistics=judged["statistics"],
            chosen={
                "projector_sha256": sha256_of(projector),
                "steps": fitted.steps,
                "image_tokens": self.side**2 + self.prompt,
                "tuned": list(self.tuned),
                "lm": mllm.lm.facts(),
            },
            layers=layers,
            seconds=seconds,
            warnings=_resumed(fitted.resumed_at, fitted.steps),
            judge=judged["judge"],
            losses=fitted.curve,
            files=judged["files"],
        )

    def _check_branches(self, mllm: Any) -> None:
        """Refuse a language model that can't be trained this way before any image is looked at."""
        from rice_eval.mllm.branches import Branches
        from rice_eval.mllm.conversation import Encoded, Example, Turn

        tokens = torch.randn(self.side**2, mllm.projector.width_in, generator=torch.Generator().manual_seed(0))
        image = Encoded(tokens, (self.side, self.side))
        asked = (
            ("Is there a dog in the image?", "No"),
            ("What does the sign say?", "open all night"),
            ("How many?", "2"),
        )
        Branches(mllm).check([Example((Turn("user", q), Turn("assistant", a)), (image,)) for q, a in asked])

    def _align(
        self,
        context: Context,
        projector: PooledProjector,
        tokens: Sequence[Tensor],
        regions: Sequence[Sequence[Region]],
        lm: LanguageModel,
    ) -> None:
        from rice_eval.mllm.align import align, steps_of, words_of

        if self.align_epochs:
            advance = context.progress("align", steps_of(len(tokens), self.align_epochs))
            words = words_of(regions, lm)
            align(
                projector,
                tokens,
                regions,
                words,
                epochs=self.align_epochs,
                lr=self.align_lr,
                seed=self.seed,
                advance=advance,
            )

    def _pooled(
        self,
        context: Context,
        split: str,
        layers: tuple[int, ...],
        note: Callable[[int, Frame], None] = lambda index, frame: None,
    ) -> dict[int, Tensor]:
        """index -> ``(side*side, D)`` of every image of a split, in the bank's number format; ``note`` sees index and frame."""
        reader = context.tokens(split, self.view).reader()
        advance = context.progress(f"read {split}", len(reader))
        out = {}
        for image in _images(reader):
            grids = {image.grids[layer][0] for layer in layers}
            if len(grids) != 1:
                raise PlanError(f"layers {', '.join(map(str, layers))} have different grids", "--set blocks=1")
            tokens = torch.cat([image.patches[layer][0] for layer in layers], dim=-1)
            out[image.index] = _on_cells(tokens, next(iter(grids)), self.side)
            note(image.index, image.frames[0])
            advance(1)
        return out

    def _judge(self, context: Context, mllm: Any, layers: tuple[int, ...]) -> dict[str, Any]:
        """Statistics, the record's ``judge``, and the files kept beside it."""
        from rice_eval.mllm.bundle import Bundle, bundle_files, mean_tokens
        from rice_eval.mllm.conversation import Encoded
        from rice_eval.mllm.judge import CONTROLS, Sample, ask_all, prompts_sha256, samples_text, statistics_of
        from rice_eval.mllm.probe import PooledProjector, sha256_of
        from rice_eval.mllm.vqa import TEMPLATE, asked

        projector = mllm.projector
        assert isinstance(projector, PooledProjector)
        bundle = Bundle(
            encoder=context.facts.name,
            weights=str(context.weights) if context.weights is not None else None,
            encoder_sha256=context.facts.sha256,
            lm=self.lm,
            lm_files=lm_identity(self.lm),
            view=self.view,
            layers=layers,
            norm=self.norm,
            stored=self.tokens,
            side=self.side,
            hidden=self.hidden,
            prompt=self.prompt,
            width_in=projector.width_in,
            width_out=projector.width_out,
            projector_sha256=sha256_of(projector),
            template=TEMPLATE,
            tuned=self.tuned,
        )
        files = bundle_files(bundle, projector)
        questions = asked(context.test)
        samples: dict[str, list[Sample]] = {}
        judge: Mapping[str, Any]
        if context.lmms_python is not None:
            from rice_eval.mllm.judge_lmms import judged_by_lmms

            samples, judge = judged_by_lmms(context.lmms_python, context.test, questions, files, context.progress)
        else:
            side = (self.side, self.side)
            tokens = self._pooled(context, "test", layers)
            questions = [q for q in questions if q.index in tokens]
            blank = Encoded(mean_tokens(projector), side)
            shown = {
                "": lambda index: Encoded(tokens[index].float(), side),
                "blind": None,
                "mean_image": lambda index: blank,
            }
            for control in CONTROLS:
                advance = context.progress(f"ask {control or 'with the image'}", len(questions))
                samples[control] = ask_all(mllm, questions, shown[control], advance)
            judge = {"name": "rice-eval", "version": __version__, "task": context.test.name, "task_version": "1"}
            judge |= {"task_hash": context.test.fingerprint[:16]}
        ids = [context.test.image_id(i) for i in range(len(context.test))]
        kept = {s.image_id for s in samples[""]}
        statistics = statistics_of(samples, [i for i in ids if i in kept])
        return {
            "statistics": statistics,
            "judge": {**judge, "prompts_sha256": prompts_sha256(samples[""]), "questions": len(samples[""])},
            "files": {**files, "samples.jsonl": samples_text(samples).encode()},
        }


def _resumed(step: int, steps: int) -> tuple[str, ...]:
    if step == steps:
        return ("the projector was trained before, and kept",)
    return (f"resumed at step {step}",) if step else ()


def _images(reader: TokenReader) -> Any:
    return iter(reader)


def _on_cells(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """``(h*w, D)`` of the bank -> ``(side*side, D)`` in float32."""
    from rice_eval.mllm.probe import pool

    return pool(tokens.float()[None], grid, side)[0]
