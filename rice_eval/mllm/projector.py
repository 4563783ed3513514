"""Projectors from an encoder's tokens to a language model's embeddings.

=================  ==================================================================================================
``linear``         one linear map (LLaVA, arXiv 2304.08485)
``mlp2x_gelu``     linear, exact gelu, linear (LLaVA-1.5, arXiv 2310.03744)
``pixel-shuffle``  blocks of 2 x 2 tokens side by side in one, channels in space-to-depth order, layer norm, linear,
                   gelu, linear (InternVL 1.5, arXiv 2404.16821)
``2x2-merge``      layer norm of every token, blocks of 2 x 2 concatenated row by row, linear, gelu, linear
                   (``PatchMerger`` of Qwen2-VL, arXiv 2409.12191, and of LLaVA-OneVision-1.5)
=================  ==================================================================================================

Where a grid has odd sides, the two that merge blocks repeat its last row or column.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rice_eval.errors import CheckpointError, UsageError

__all__ = ["KINDS", "Projector"]

KINDS = ("linear", "mlp2x_gelu", "pixel-shuffle", "2x2-merge")
_MERGING = ("pixel-shuffle", "2x2-merge")
_KEY = "rice_eval.projector.1"


class Projector(nn.Module):
    """Tokens of a grid to embeddings: ``forward(tokens (T, N, D), grid) -> (T, n, D_lm)``.

    Attributes:
        kind: one of ``KINDS``.
        width_in: D, of the encoder's tokens.
        width_out: of the language model's embeddings.
        hidden: width between the linear maps; None for ``linear``.
    """

    def __init__(
        self,
        kind: str,
        width_in: int,
        width_out: int,
        *,
        hidden: int | None = None,
        bias: bool = True,
        act: str = "gelu",
        eps: float = 1e-5,
    ) -> None:
        """Layers with torch's default weights, drawn from the global generator; ``new`` gives seeded ones.

        Args:
            kind: one of ``KINDS``.
            width_in, width_out: see the class.
            hidden: by default ``width_out`` for ``mlp2x_gelu`` and ``pixel-shuffle``, ``4 * width_in`` for ``2x2-merge``.
            bias: of the linear maps.
            act: ``gelu`` (exact) or ``gelu_pytorch_tanh``.
            eps: of the layer norm.

        Raises:
            UsageError: an unknown kind or activation.
        """
        super().__init__()
        if kind not in KINDS:
            raise UsageError(f"no projector is called '{kind}'", f"choose one of {', '.join(KINDS)}")
        if act not in ("gelu", "gelu_pytorch_tanh"):
            raise UsageError(f"projectors know no activation '{act}'", "choose gelu or gelu_pytorch_tanh")
        self.kind, self.width_in, self.width_out, self.act_name = kind, width_in, width_out, act
        usual = {"mlp2x_gelu": width_out, "pixel-shuffle": width_out, "2x2-merge": 4 * width_in}
        self.hidden = None if kind == "linear" else hidden or usual[kind]
        merged = 4 * width_in if kind in _MERGING else width_in
        self.norm = (
            nn.LayerNorm(width_in if kind == "2x2-merge" else merged, eps=eps) if kind in _MERGING else nn.Identity()
        )
        if self.hidden is None:
            self.layers = nn.Sequential(nn.Linear(merged, width_out, bias=bias))
        else:
            gelu = nn.GELU(approximate="tanh" if act == "gelu_pytorch_tanh" else "none")
            self.layers = nn.Sequential(
                nn.Linear(merged, self.hidden, bias=bias), gelu, nn.Linear(self.hidden, width_out, bias=bias)
            )

    @classmethod
    def new(cls, kind: str, width_in: int, width_out: int, seed: int = 0) -> Projector:
        """A projector with torch's default weights, drawn from ``seed``; the global generator is left as it was.

        Raises:
            UsageError: an unknown kind.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(kind, width_in, width_out)

    @property
    def merges(self) -> bool:
        """Whether four tokens become one."""
        return self.kind in _MERGING

    def grid_out(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid ``(h, w)`` after projection."""
        return ((grid[0] + 1) // 2, (grid[1] + 1) // 2) if self.merges else grid

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project.

        Args:
            tokens: ``(T, N, width_in)`` in raster order.
            grid: ``(h, w)``, N = h * w.

        Returns:
            ``(T, n, width_out)`` in raster order of ``grid_out(grid)``.

        Raises:
            UsageError: tokens of another width, or a grid that is not theirs.
        """
        if tokens.shape[-1] != self.width_in:
            raise UsageError(
                f"tokens of width {tokens.shape[-1]} for a projector that takes {self.width_in}",
                "use the projector with the encoder and layers it was made for",
            )
        if tokens.shape[1] != grid[0] * grid[1]:
            raise UsageError(
                f"{tokens.shape[1]} tokens are no grid of {grid[0]} x {grid[1]}", "give the tokens' own grid"
            )
        tokens = tokens.to(next(self.parameters()).dtype)
        if self.kind == "2x2-merge":
            tokens = _blocks(self.norm(tokens), grid).flatten(2)
        elif self.kind == "pixel-shuffle":
            tokens = self.norm(_blocks(tokens, grid).transpose(2, 3).flatten(2))
        out: Tensor = self.layers(tokens)
        return out

    def facts(self) -> dict[str, object]:
        """Kind, widths and size, as JSON values."""
        return {
            "kind": self.kind,
            "width_in": self.width_in,
            "width_out": self.width_out,
            "hidden": self.hidden,
            "act": self.act_name,
            "params": sum(p.numel() for p in self.parameters()),
        }

    def save(self, path: Path) -> None:
        """Write weights, kind and widths as safetensors. The bytes depend on them alone; a killed write leaves no file.

        Raises:
            UsageError: the folder can't be written to.
        """
        first = self.layers[0]
        told = {
            "kind": self.kind,
            "width_in": self.width_in,
            "width_out": self.width_out,
            "hidden": self.hidden,
            "bias": first.bias is not None,
            "act": self.act_name,
            "eps": getattr(self.norm, "eps", 1e-5),
        }
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}
        data = save(tensors, metadata={_KEY: json.dumps(told, sort_keys=True)})  # one key: their order is not fixed
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise UsageError(f"{path}: can't be written ({error.strerror})", "choose another folder") from error

    @classmethod
    def load(cls, path: Path, width_in: int | None = None, width_out: int | None = None) -> Projector:
        """Read a saved one.

        Args:
            path: written by ``save``.
            width_in, width_out: what the encoder gives and the language model takes; None where it does not matter.

        Raises:
            CheckpointError: not such a file, damaged, or of another width (both are named).
        """
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: can't be read ({str(error)[:120]})", "check the path, or train it again"
            ) from error
        if _KEY not in meta:
            raise CheckpointError(f"{path}: is no projector of rice-eval", "give a file that a recipe wrote")
        told = json.loads(meta[_KEY])
        for side, have, want in (
            ("encoder", told["width_in"], width_in),
            ("language model", told["width_out"], width_out),
        ):
            if want is not None and have != want:
                verb = "takes tokens" if side == "encoder" else "gives embeddings"
                raise CheckpointError(
                    f"{path}: the projector {verb} of width {have}, the {side}'s have {want}",
                    f"use the {side} it was trained with, or train a projector for this one",
                )
        module = cls(
            told["kind"],
            told["width_in"],
            told["width_out"],
            hidden=told["hidden"],
            bias=told["bias"],
            act=told["act"],
            eps=told["eps"],
        )
        module.fill(tensors, str(path))
        return module

    def fill(self, tensors: dict[str, Tensor], where: str) -> None:
        """Take these weights, which must be all there are.

        Raises:
            CheckpointError: missing or unexpected names, or other shapes.
        """
        want = {n: tuple(t.shape) for n, t in self.state_dict().items()}
        have = {n: tuple(t.shape) for n, t in tensors.items()}
        if want != have:
            odd = sorted(set(want.items()) ^ set(have.items()))[0]
            raise CheckpointError(
                f"{where}: the projector's tensors do not fit {self.kind} (first: {odd[0]} {list(odd[1])})",
                "the file is not whole, or of another model",
            )
        self.load_state_dict(tensors, assign=True)


def _blocks(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(T, h*w, D)`` -> ``(T, n, 4, D)``: blocks of 2 x 2 in raster order, row by row inside; odd sides repeat their last."""
    (h, w), (tiles, _, depth) = grid, tokens.shape
    maps = tokens.reshape(tiles, h, w, depth)
    if h % 2:
        maps = torch.cat([maps, maps[:, -1:]], dim=1)
    if w % 2:
        maps = torch.cat([maps, maps[:, :, -1:]], dim=2)
    rows, cols = maps.shape[1] // 2, maps.shape[2] // 2
    cut = maps.reshape(tiles, rows, 2, cols, 2, depth).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(tiles, rows * cols, 4, depth)
