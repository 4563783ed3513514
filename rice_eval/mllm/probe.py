"""The ``perception-probe``: encoder and language model frozen, a projector between them trained on banked tokens.

Tokens are averaged onto a small grid, standardised by the training set, and mapped by a two-layer MLP to words; one more linear
layer and a few learned embeddings behind the image make them readable. Nothing else learns, so what a language model can be told
about an image is what the encoder's tokens hold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rice_eval.errors import CheckpointError, DataError
from rice_eval.mllm.branches import Branches
from rice_eval.mllm.conversation import Encoded, Example, Turn
from rice_eval.mllm.model import Mllm
from rice_eval.mllm.projector import Projector
from rice_eval.mllm.vqa import Dialogue
from rice_eval.probes.linear import warmup_cosine
from rice_eval.probes.training_state import TrainingState

__all__ = [
    "PooledProjector",
    "Schedule",
    "Trained",
    "fit",
    "generator",
    "load_projector",
    "pool",
    "projector_bytes",
    "sha256_of",
    "visit_of",
]

_CLIP = 1.0  # gradient norm; the customary value of LLaVA's recipes (Trainer's max_grad_norm)
_WARMUP = 0.03  # share of the steps; as LLaVA's stage 1 (arXiv 2310.03744, table 9)


def pool(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """``(B, h*w, D)`` -> ``(B, side*side, D)``: means over a grid of ``side`` x ``side`` cells (adaptive average)."""
    if grid == (side, side):
        return tokens
    batch, _, width = tokens.shape
    maps = tokens.transpose(1, 2).reshape(batch, width, *grid)
    return nn.functional.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2).contiguous()


class PooledProjector(Projector):
    """Average onto ``side`` x ``side``, standardise by channel, two linear layers with gelu, root mean square of a word's
    embedding; then the reading layer (linear, the identity at first) and ``prompt`` learned embeddings behind the cells.

    A frozen language model reads embeddings of the size it knows; without that scaling, Adam's first steps blow them up to fifty
    times that. It does not read a grid of words as a list of what is there: the reading layer and the prompt learn to make it so.

    Args:
        width_in, width_out: of the encoder's tokens (all layers together) and of the language model's embeddings.
        side: cells a side.
        hidden: width between the layers.
        prompt: learned embeddings behind the cells; an image becomes ``side**2 + prompt`` embeddings, whatever the encoder's grid.
        seed: of the first weights.
    """

    def __init__(self, width_in: int, width_out: int, side: int, hidden: int, prompt: int, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__("mlp2x_gelu", width_in, width_out, hidden=hidden)
            self.reading = nn.Linear(width_out, width_out)
        nn.init.eye_(self.reading.weight)
        nn.init.zeros_(self.reading.bias)
        self.prompt = nn.Parameter(torch.zeros(prompt, width_out))
        self.side = side
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(width_in))
        self.register_buffer("scale", torch.ones(width_in))
        self.size: Tensor
        self.register_buffer("size", torch.ones(()))

    def start(self, tokens: Iterable[Tensor], size: Tensor, prompt: Tensor) -> None:
        """Take mean and scale from the training set's pooled tokens, an output's size and the prompt from the language model's words.

        Args:
            tokens: ``(n, D)`` each, pooled; walked once.
            size: root mean square of the words' embeddings, a scalar.
            prompt: ``(n, D_lm)`` words that the prompt begins as; said over and over where they are too few.

        Raises:
            DataError: no tokens.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for rows in tokens:
            rows64 = rows.double()
            total, squares, count = total + rows64.sum(0), squares + rows64.square().sum(0), count + len(rows)
        if count == 0:
            raise DataError("no training image has tokens", "check the training split")
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        # A channel that never moves stays as it is instead of being blown up.
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), torch.ones_like(deviation)))
        self.size.copy_(size)
        with torch.no_grad():
            self.prompt.copy_(prompt[torch.arange(len(self.prompt)) % len(prompt)].to(self.size) / self.size)

    def grid_out(self, grid: tuple[int, int]) -> tuple[int, int]:
        """``(side, side)``, whatever the grid: the cells, without the prompt."""
        return self.side, self.side

    def words(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(T, h*w, D)`` -> ``(T, side*side, D_lm)``, root mean square 1: what ``rice_eval.mllm.align`` teaches."""
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        cells = pool(tokens.to(first.weight.dtype), grid, self.side)
        out = super().forward((cells - self.mean) * self.scale, (self.side, self.side))
        return out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-6)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(T, h*w, D)`` -> ``(T, side*side + prompt, D_lm)``."""
        cells: Tensor = self.reading(self.words(tokens, grid))
        return torch.cat([cells, self.prompt.expand(cells.shape[0], -1, -1)], dim=1) * self.size

    def facts(self) -> dict[str, object]:
        """See ``Projector.facts``; with the side of the grid and the prompt's length."""
        told = {"kind": "pooled-mlp2x_gelu", "side": self.side, "prompt": len(self.prompt)}
        return {**super().facts(), **told}


@dataclass(frozen=True)
class Schedule:
    """How the projector learns: AdamW, warm-up over 3 % of the steps, then half a cosine.

    Attributes:
        lr: peak rate.
        prompt_lr: that of the learned embeddings behind the image.
        weight_decay: of AdamW.
        batch: images a step.
        epochs: passes over the training images.
        turns: questions about an image at most, each asked alone.
        seed: of weights, order of images, choice of questions.
    """

    lr: float
    prompt_lr: float
    weight_decay: float
    batch: int
    epochs: float
    turns: int
    seed: int

    def steps(self, images: int) -> int:
        """Steps in all."""
        return max(1, math.ceil(images * self.epochs / self.batch))

    def factor(self, step: int, steps: int) -> float:
        """Of the peak rate at ``step``, from 0."""
        return warmup_cosine(step, steps, max(1, math.ceil(_WARMUP * steps)))

    def batch_at(self, step: int, images: int) -> list[tuple[int, int]]:
        """Epoch and position of each image of ``step``: every epoch is a permutation of its own, so that a resumed run sees the same."""
        out = []
        for k in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(k, images)
            order = torch.randperm(images, generator=generator(self.seed, 1, epoch))
            out.append((epoch, int(order[place])))
        return out


def generator(*parts: int) -> torch.Generator:
    """A generator that depends on these numbers alone: a resumed run draws what a whole one draws."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Trained:
    """What training left: mean loss of each window of steps ``(last step, loss)``, steps, and the step it went on from (0: none)."""

    curve: tuple[tuple[float, float], ...]
    steps: int
    resumed_at: int


def visit_of(dialogue: Dialogue, schedule: Schedule, visit: int, index: int, image: Encoded) -> list[Example]:
    """Questions of one visit to an image, drawn anew each time; each is an example of its own."""
    order = torch.randperm(len(dialogue.questions), generator=generator(schedule.seed, 2, visit, index)).tolist()
    asked = [dialogue.questions[int(k)] for k in order[: schedule.turns]]
    return [Example((Turn("user", q.question), Turn("assistant", q.answer)), (image,)) for q in asked]


def fit(
    mllm: Mllm,
    tokens: Sequence[Tensor],
    dialogues: Sequence[Dialogue],
    schedule: Schedule,
    state: TrainingState,
    advance: Callable[[int], None] = lambda n: None,
    window: int = 25,
    begin: Callable[[], None] = lambda: None,
    aligned: bool = False,
) -> Trained:
    """Train the model's ``PooledProjector`` and nothing else, every question asked alone (``rice_eval.mllm.branches``).

    Args:
        mllm: encoder and language model stay frozen.
        tokens: ``(side*side, D)`` pooled tokens of each training image.
        dialogues: what is said about each.
        schedule: rates and numbers of steps.
        state: where a killed run goes on from.
        advance: called with the number of steps done, the restored ones included.
        window: steps averaged into one point of the curve.
        begin: called before the first step of a run that has no state to go on from.
        aligned: leave the layers up to the words as they are, since ``begin`` has taught them.

    Raises:
        DataError: the loss is not finite.
        CheckpointError: a state that is not this run's.
    """
    projector = mllm.projector
    if not isinstance(projector, PooledProjector):
        raise CheckpointError("the perception probe trains its own projector", "build the model with a PooledProjector")
    side = projector.side
    layers = [*projector.reading.parameters(), *([] if aligned else projector.layers.parameters())]
    parameters = [*layers, projector.prompt]
    rates = (schedule.lr, schedule.prompt_lr)
    groups = [{"params": layers}, {"params": [projector.prompt]}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
    branches = Branches(mllm)
    steps = schedule.steps(len(tokens))
    first = 0
    curve: list[tuple[float, float]] = []
    pending: list[float] = []
    saved = state.load()
    if saved is None:
        begin()
    else:
        try:
            projector.load_state_dict(saved["projector"])
            optimizer.load_state_dict(saved["optimizer"])
            first, curve, pending = saved["step"], [tuple(point) for point in saved["curve"]], saved["pending"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{state.path}: is no state of this training", "delete it to start over") from error
    projector.train()
    projector.layers.requires_grad_(not aligned)
    advance(first)
    for step in range(first, steps):
        picked = schedule.batch_at(step, len(tokens))
        visits = [visit_of(dialogues[k], schedule, epoch, k, Encoded(tokens[k], (side, side))) for epoch, k in picked]
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule.factor(step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss = branches.loss(visits)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DataError(f"the probe's loss is {value} at step {step + 1}", "lower --set lr")
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        pending.append(value)
        if len(pending) == window or step + 1 == steps:
            curve.append((float(step + 1), sum(pending) / len(pending)))
            pending = []
        advance(1)
        kept = {"step": step + 1, "projector": projector.state_dict(), "optimizer": optimizer.state_dict()}
        kept |= {"curve": [list(point) for point in curve], "pending": pending}
        state.save(kept, force=step + 1 == steps)
    if not all(bool(p.isfinite().all()) for p in projector.parameters()):
        raise DataError("the trained projector has weights that are not finite", "lower --set lr and prompt_lr")
    projector.eval()
    return Trained(tuple(curve), steps, first)


def sha256_of(projector: nn.Module) -> str:
    """sha256 over the names and bytes of a projector's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(projector.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def projector_bytes(projector: PooledProjector) -> bytes:
    """Its weights as safetensors; the bytes depend on them alone."""
    from safetensors.torch import save

    return bytes(save({k: v.detach().cpu().contiguous() for k, v in sorted(projector.state_dict().items())}))


def load_projector(path: Path, told: dict[str, Any]) -> PooledProjector:
    """Read what ``projector_bytes`` gave; ``told`` are ``side``, ``hidden``, ``prompt``, ``width_in``, ``width_out``.

    Raises:
        CheckpointError: missing, damaged, or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read ({str(error)[:120]})", "train the probe again") from error
    projector = PooledProjector(told["width_in"], told["width_out"], told["side"], told["hidden"], told["prompt"])
    projector.fill(tensors, str(path))
    return projector.eval()
