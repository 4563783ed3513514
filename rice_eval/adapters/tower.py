"""What every encoder that runs on a ``transformers`` module shares: strict building, tokens of every block, normalisation.

The library's class is built from numbers and filled with tensors that were compared one by one; ``from_pretrained``, which
fills gaps with random numbers and a warning, is never called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rice_eval.adapters.base import Encoder, EncoderFacts, Tokens, fingerprint_of
from rice_eval.errors import CheckpointError, MissingExtraError, PlanError

__all__ = [
    "Tower",
    "build",
    "core",
    "fill",
    "first_line",
    "parameters_on_meta",
    "quiet",
    "shapes_of",
    "transformers_module",
    "unit",
]


class _Enough(Exception):
    """Ends a forward after the deepest block asked for."""


def transformers_module(purpose: str) -> Any:
    """The package ``transformers``, quiet about its progress.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError.of("transformers", "transformers", purpose) from error
    return transformers


@contextmanager
def quiet(library: Any) -> Iterator[None]:
    """No progress bars and no loading report from transformers: what they would say is checked and raised here."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside hold parameters without storage; buffers, which files do not carry, are computed as usual."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build(cls: Any, config: Any, where: str) -> Any:
    """An instance of a transformers class with parameters still without storage, SDPA attention, eval mode.

    Raises:
        CheckpointError: numbers the class refuses.
    """
    try:
        with parameters_on_meta():
            model = cls._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except Exception as error:  # transformers' validators raise kinds of their own, by version
        raise CheckpointError(
            f"{where}: no {cls.__name__} can be built from its numbers ({first_line(error)})", "check config.json"
        ) from error
    return model.eval()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, with the next where it ends in a colon; or the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 1 + lines[0].endswith(":")])[:200]


def core(model: Any) -> Any:
    """The module that holds embeddings, blocks and norm: transformers 4.x keeps it one level down, 5.x does not."""
    return getattr(model, "vision_model", model)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that a checkpoint must bring."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the parameters their storage, in float32. Names and shapes were compared before; a gap here is a bug."""
    ready = {name: (t.float() if t.is_floating_point() else t).contiguous() for name, t in tensors.items()}
    parameters = dict(model.named_parameters())
    counts = [name for name, t in ready.items() if name in parameters and not t.is_floating_point()]
    if counts:
        raise CheckpointError(
            f"{counts[0]} holds {ready[counts[0]].dtype}, no weights", "save it in bf16, fp16 or fp32"
        )
    model.load_state_dict(ready, strict=True, assign=True)
    left = [name for name, p in model.named_parameters() if p.is_meta] + [
        n for n, b in model.named_buffers() if b.is_meta
    ]
    if left:
        raise CheckpointError(
            f"no tensor was given for {left[0]}", "this is a bug: report it with the checkpoint's name"
        )
    model.requires_grad_(False)


def unit(embeddings: Tensor) -> Tensor:
    """``(B, E)`` divided by their L2 norm."""
    return torch.nn.functional.normalize(embeddings, dim=-1)


class Tower(Encoder):
    """A ViT of transformers as an ``Encoder``.

    Args:
        facts: all but ``params`` and ``sha256``, which are counted here.
        model: the whole module, text tower included where there is one.
        vision: the part that turns pixels into tokens; its parameters are the encoder's size.
        blocks: the transformer blocks of ``vision``, in order.
        final_norm: the norm after the last block; None where the checkpoint has none.
        leading: number of class tokens (0 or 1) and of register tokens before the patch tokens.
        run: one forward of ``vision`` on normalised pixels ``(B, 3, H, W)``.
        architecture: every number that changes the tokens, for the fingerprint.
        norm_missing: why ``norm=True`` is refused, where the family has a final norm and this checkpoint lacks it.
        fingerprint_skips: parameters the file does not hold and no forward passes through.
        identity: tensors to fingerprint in place of the model's, where the library renames them from version to version.
    """

    def __init__(
        self,
        facts: EncoderFacts,
        *,
        model: nn.Module,
        vision: nn.Module,
        blocks: Sequence[nn.Module],
        final_norm: nn.Module | None,
        leading: tuple[int, int],
        run: Callable[[Tensor], Any],
        architecture: Mapping[str, Any],
        norm_missing: str | None = None,
        fingerprint_skips: tuple[str, ...] = (),
        identity: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model = model
        self._vision = vision
        self._blocks = list(blocks)
        self._norm = final_norm
        self._leading = leading
        self._run = run
        self._norm_missing = norm_missing
        self._mean = torch.tensor(facts.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(facts.std).view(1, 3, 1, 1)
        kept = {
            n.replace("vision_model.", "", 1): t for n, t in model.state_dict().items() if n not in fingerprint_skips
        }
        weights = kept if identity is None else identity
        self.facts = replace(
            facts,
            params=sum(p.numel() for n, p in vision.named_parameters() if n not in fingerprint_skips),
            sha256=fingerprint_of(weights, {**architecture, "mean": facts.mean, "std": facts.std}),
        )

    def to(self, device: torch.device) -> Tower:
        """Move the weights; returns self."""
        self._model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        self.device = device
        return self

    def tunable(self) -> nn.Module:
        """The image tower."""
        return self._vision

    def normalise(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] -> the same, minus mean, divided by std."""
        return (images - self._mean) / self._std

    def _compilable(self) -> Sequence[nn.Module]:
        return self._blocks

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        if norm and self._norm_missing:
            raise PlanError(f"encoder '{self.name}' {self._norm_missing}", "encode with norm=False")
        caught: dict[int, Tensor] = {}
        handles = []

        def catcher(number: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                caught[number] = output[0] if isinstance(output, tuple) else output
                if number == layers[-1]:
                    raise _Enough

            return hook

        try:
            for number in layers:
                handles.append(self._blocks[number - 1].register_forward_hook(catcher(number)))
            self._run(self.normalise(images))
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if norm and self._norm is not None:
            caught = {number: self._norm(tokens) for number, tokens in caught.items()}
        n_cls, n_registers = self._leading
        first = n_cls + n_registers
        grid = (images.shape[-2] // self.facts.patch, images.shape[-1] // self.facts.patch)
        deepest = caught[layers[-1]]
        return Tokens(
            patches={number: tokens[:, first:] for number, tokens in caught.items()},
            grids=dict.fromkeys(caught, grid),
            cls=deepest[:, 0] if n_cls else None,
            registers=deepest[:, n_cls:first] if n_registers else None,
        )
