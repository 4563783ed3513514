"""Training of a multimodal model by a ``Recipe``, on one process or on those that ``torchrun`` or ``accelerate launch`` start.

A step's loss is the sum over the assistant's tokens of the whole batch divided by their number, however the batch is dealt
over processes and portions. The order of the data depends on the seed alone, so that the state (weights, optimizer, step,
generators) is all a killed run needs to go on to the same end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rice_eval.adapters.tower import first_line
from rice_eval.errors import CheckpointError, DataError, MissingExtraError, PlanError, UsageError
from rice_eval.mllm.conversation import Example
from rice_eval.mllm.llava_data import LlavaData, batches
from rice_eval.mllm.llava_recipe import Recipe
from rice_eval.mllm.model import Mllm
from rice_eval.mllm.trained import save_trained

__all__ = ["Progress", "train"]

_STATE = "state-"


class Progress:
    """Steps done and their losses: what is saved beside weights, optimizer and generators."""

    def __init__(self) -> None:
        self.step = 0
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """For accelerate."""
        return {"step": self.step, "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For accelerate."""
        self.step, self.losses = int(state["step"]), [float(x) for x in state["losses"]]


class _Trainee(nn.Module):
    """The tuned weights, and a forward that runs through them: what accelerate wraps, reduces and saves."""

    def __init__(self, mllm: Mllm, recipe: Recipe) -> None:
        super().__init__()
        self._mllm = [mllm]  # in a list: frozen weights are no part of this module
        self._max_length = recipe.max_length
        if "tower" in recipe.tuned:
            self.tower = mllm.encoder.tunable()
        if "projector" in recipe.tuned:
            self.projector = mllm.projector
        if "newline" in recipe.tuned and mllm.newline is not None:
            self.newline = mllm.newline
        if "lm" in recipe.tuned:
            self.lm = mllm.lm.model
        if "lm-lora" in recipe.tuned:
            own = {n.replace(".", "/"): p for n, p in mllm.lm.model.named_parameters() if "lora_" in n}
            self.lora = nn.ParameterDict(own)

    def forward(self, examples: list[Example]) -> tuple[Tensor, int]:
        loss, count = self._mllm[0].summed_loss(examples, self._max_length)
        if not loss.requires_grad:  # words alone, where only what sees is tuned: nothing to learn, and no error
            loss = loss + 0 * next(p for p in self.parameters() if p.requires_grad).flatten()[0]
        return loss, count


def train(
    mllm: Mllm,
    recipe: Recipe,
    data: LlavaData,
    out: Path,
    *,
    portion: int = 1,
    save_every: int = 500,
    checkpointing: bool = False,
    parts: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Progress:
    """Train the parts that ``recipe`` tunes and write them to ``out``; a killed run goes on where it was saved.

    Args:
        mllm: changed in place.
        recipe: what is tuned, and how.
        data: conversations; ``data.plain`` must be the recipe's.
        out: folder of the state (while it runs) and of the trained parts (see ``trained``).
        portion: entries that go through the model together on one process: memory and speed, not the result.
        save_every: steps between two states.
        checkpointing: forget activations of the language model and compute them again: less memory, more time.
        parts: ``Parts.facts()`` of a model of registry parts, kept so that ``load_folder`` can build it again.
        on_step: told (steps done, steps in all, loss) after each.

    Returns:
        Steps and losses.

    Raises:
        MissingExtraError: accelerate or peft is not installed.
        UsageError: a state of another recipe, model or data in ``out``.
        DataError: an image that can't be opened, or a loss that is not finite.
        PlanError: an encoder that can't be tuned.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, set_seed
    except ImportError as error:
        raise MissingExtraError.of("accelerate", "mllm", f"recipe '{recipe.name}'") from error
    if data.plain != recipe.plain:
        raise UsageError(
            f"recipe '{recipe.name}' and the data differ in 'plain'", f"read the data with plain={recipe.plain}"
        )
    if portion < 1 or save_every < 1:
        raise UsageError("portion and save_every are at least 1", "give larger numbers")
    facts = {"recipe": recipe.facts(), "data": data.fingerprint, "entries": len(data), "model": mllm.facts()}
    if parts is not None:
        facts["parts"] = dict(parts)
    set_seed(recipe.seed)
    if mllm.device.type == "cuda":
        # Where accelerate puts a single process; under torchrun it is the process's own.
        torch.cuda.set_device(mllm.device)
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if recipe.bf16 else "no",
            cpu=mllm.device.type == "cpu",
            # A portion without images leaves the projector out.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:  # accelerate keeps one setting a process
        raise UsageError(
            f"recipe '{recipe.name}' can't start ({first_line(error)})", "start it in a process of its own"
        ) from error
    mllm.to(accelerator.device)
    plan = [
        b
        for e in range(recipe.epochs)
        for b in batches(data, recipe.batch, grouped=recipe.grouped, seed=recipe.seed, epoch=e)
    ]
    progress = Progress()
    with _tuning(mllm, recipe, checkpointing):
        trainee = _Trainee(mllm, recipe)
        optimizer = torch.optim.AdamW(
            _groups(trainee, recipe), betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
        )
        peaks = [group["lr"] for group in optimizer.param_groups]
        model, optimizer = accelerator.prepare(trainee, optimizer)
        accelerator.register_for_checkpointing(progress)
        _resume(accelerator, out, facts)
        while progress.step < len(plan):
            factor = recipe.rate(progress.step, len(plan))
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            loss = _step(accelerator, model, optimizer, data, plan[progress.step], recipe, portion)
            if not loss < float("inf"):
                raise DataError(
                    f"the loss is {loss} at step {progress.step + 1}", "look at the data, or lower the rate"
                )
            progress.step += 1
            progress.losses.append(loss)
            if on_step is not None:
                on_step(progress.step, len(plan), loss)
            if progress.step % save_every == 0 and progress.step < len(plan):
                _save(accelerator, out, progress.step, facts)
        if not all(bool(p.isfinite().all()) for p in trainee.parameters() if p.requires_grad):
            raise DataError("the trained model has weights that are not finite", "lower the rate")
    accelerator.wait_for_everyone()
    mllm.retuned(recipe)
    if accelerator.is_main_process:
        save_trained(mllm, out, {**facts, "losses": progress.losses})
        for old in _states(out):
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return progress


def _step(
    accelerator: Any,
    model: Any,
    optimizer: Any,
    data: LlavaData,
    batch: list[int],
    recipe: Recipe,
    portion: int,
) -> float:
    """One step over this process's share of a batch; the mean loss over the assistant's tokens of the whole batch."""
    processes = accelerator.num_processes
    mine = [data[n] for n in batch[accelerator.process_index :: processes]]
    # Every process runs as many forwards as the others: those that have run out repeat one and count it as nothing.
    share = math.ceil(len(batch) / processes)
    rounds = math.ceil(share / portion)
    sums = torch.zeros(2, device=accelerator.device)  # loss, tokens
    optimizer.zero_grad()
    for n in range(rounds):
        part = mine[n * portion : (n + 1) * portion]
        with accelerator.no_sync(model) if n + 1 < rounds else nullcontext():
            loss, count = model(part or [data[batch[0]]])
            # The mean over processes that comes with the gradients' exchange is undone, so that they hold sums.
            accelerator.backward(loss * (processes if part else 0))
        if part:
            sums += torch.stack([loss.detach().float(), torch.tensor(float(count), device=loss.device)])
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= max(1.0, tokens)
    accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return float(total / max(1.0, tokens))


def _groups(trainee: _Trainee, recipe: Recipe) -> list[dict[str, Any]]:
    rates = {"tower": recipe.tower_lr, "projector": recipe.projector_lr}
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trainee.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(name.split(".")[0], []).append(parameter)
    if not groups:
        raise PlanError(f"recipe '{recipe.name}' finds nothing to tune", "choose other parts")
    return [{"params": own, "lr": rates.get(name) or recipe.lr} for name, own in groups.items()]


@contextmanager
def _tuning(mllm: Mllm, recipe: Recipe, checkpointing: bool) -> Iterator[None]:
    """Within it the tuned parts ask for gradients; afterwards all is frozen again and LoRA's maps are merged."""
    parts = recipe.tuned
    if "lm-lora" in parts:
        _add_lora(mllm, recipe)
    if "lm" in parts:
        mllm.lm.model.float().requires_grad_(True)
    mllm.projector.requires_grad_("projector" in parts)
    if mllm.newline is not None:
        mllm.newline.requires_grad_("newline" in parts)
    if "tower" in parts:
        mllm.encoder.tunable().requires_grad_(True)
        mllm.sight.tuned = True
    learns = "lm" in parts or "lm-lora" in parts
    mllm.lm.model.train(learns or checkpointing)
    if checkpointing:
        mllm.lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            mllm.lm.model.gradient_checkpointing_disable()
        if "lm-lora" in parts:
            mllm.lm.model = mllm.lm.model.merge_and_unload()
        mllm.lm.model.eval().requires_grad_(False)
        mllm.projector.requires_grad_(False)
        if mllm.newline is not None:
            mllm.newline.requires_grad_(False)
        if "tower" in parts:
            mllm.encoder.tunable().requires_grad_(False)
            mllm.sight.tuned = False


def _add_lora(mllm: Mllm, recipe: Recipe) -> None:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError(
            f"recipe '{recipe.name}' tunes by LoRA, which needs the package 'peft', which is not installed",
            "pip install peft",
        ) from error
    settings = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    mllm.lm.model = get_peft_model(mllm.lm.model, settings)


def _states(out: Path) -> list[Path]:
    return sorted(out.glob(f"{_STATE}[0-9]*"))


def _save(accelerator: Any, out: Path, step: int, facts: dict[str, Any]) -> None:
    """A whole state beside the old one, renamed when it is complete; then the old one goes."""
    part = out / f".{_STATE}part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"{out}: can't be written to ({error.strerror})", "choose another folder") from error
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / "facts.json").write_text(json.dumps({**facts, "processes": accelerator.num_processes}, sort_keys=True))
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        old = _states(out)
        part.replace(out / f"{_STATE}{step:09d}")
        for folder in old:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def _resume(accelerator: Any, out: Path, facts: dict[str, Any]) -> None:
    found = _states(out)
    if not found:
        return
    try:
        told = json.loads((found[-1] / "facts.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{found[-1]}: is no whole state ({type(error).__name__})", "delete it to start over"
        ) from error
    want = {**facts, "processes": accelerator.num_processes}
    odd = [key for key in want if told.get(key) != json.loads(json.dumps(want[key]))]
    if odd:
        raise UsageError(
            f"{found[-1]}: a training with another {', '.join(odd)} was killed here",
            "give the same model, recipe, data and number of processes, or another folder",
        )
    try:
        accelerator.load_state(str(found[-1]))
    except Exception as error:  # damaged files fail in many ways, by their format
        raise CheckpointError(f"{found[-1]}: can't be read ({first_line(error)})", "delete it to start over") from error
