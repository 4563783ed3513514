"""A user's own code: ``file:path.py:factory``, where ``factory()`` gives an encoder or a module.

The module takes images ``(B, 3, H, W)`` in [0, 1], normalises them itself, and its forward gives a map ``(B, D, h, w)``, or
several (a list, or a dict in order): one a layer. Two attributes are read where it has them: ``resolution`` (native side in
pixels, 224 otherwise) and ``license``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rice_eval.adapters.base import Encoder, LoadRequest
from rice_eval.adapters.blocks import MapEncoder, describe
from rice_eval.errors import CardError, NotFoundError, RiceEvalError, UsageError

__all__ = ["adapter"]


class _Maps(nn.Module):
    """Any of the allowed outputs as a list of maps, checked."""

    def __init__(self, inner: nn.Module, where: str) -> None:
        super().__init__()
        self.inner = inner
        self._where = where

    def forward(self, x: Tensor) -> list[Tensor]:
        out = self.inner(x)
        maps: list[Any]
        if isinstance(out, Tensor):
            maps = [out]
        elif isinstance(out, Mapping):
            maps = list(out.values())
        elif isinstance(out, Sequence):
            maps = list(out)
        else:
            maps = []
        if not maps or not all(isinstance(m, Tensor) and m.ndim == 4 and m.shape[0] == x.shape[0] for m in maps):
            raise UsageError(
                f"{self._where}: forward gives {_shape_of(out)}", "give a map (B, D, h, w), or a list or dict of maps"
            )
        return maps


def _shape_of(out: Any) -> str:
    if isinstance(out, Tensor):
        return f"a tensor {tuple(out.shape)}"
    if isinstance(out, Mapping):
        return "{" + ", ".join(f"{k}: {_shape_of(v)}" for k, v in out.items()) + "}"
    if isinstance(out, Sequence) and not isinstance(out, str):
        return "[" + ", ".join(_shape_of(v) for v in out) + "]"
    return f"a {type(out).__name__}"


def _factory(path: Path, attribute: str) -> Callable[..., Any]:
    """The factory inside the file; modules beside the file can be imported by it."""
    if not path.is_file():
        raise NotFoundError(f"file:{path}: no such file", "check the path")
    name = f"rice_eval_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"file:{path}: is no Python file", "name a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        sys.modules.pop(name, None)
        raise UsageError(
            f"file:{path}: importing it raised {type(error).__name__}: {error}", "mend the file"
        ) from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    found = getattr(module, attribute, None)
    if not callable(found):
        raise NotFoundError(f"file:{path}: has no function '{attribute}'", f"write file:{path.name}:FACTORY")
    return found  # type: ignore[no-any-return]


def adapter(request: LoadRequest) -> Encoder:
    """Call the user's factory, with ``weights=PATH`` where ``--weights`` was given.

    Raises:
        NotFoundError: no such file or function.
        UsageError: code that raises, or gives neither an encoder nor a module of maps.
        CardError: a reference that is not ``path.py:factory``.
    """
    reference = request.card.source.file or ""
    place, _, attribute = reference.rpartition(":")
    if not place or not attribute.isidentifier():
        raise CardError(
            f"encoder '{request.card.name}': '{reference}' is not path.py:factory", "write file:path.py:factory"
        )
    path = Path(place).expanduser()
    factory = _factory(path, attribute)
    arguments = {} if request.weights is None else {"weights": request.weights}
    try:
        made = factory(**arguments)
    except RiceEvalError:
        raise
    except Exception as error:  # whatever the user's code raises
        fix = "a factory for --weights takes the keyword 'weights'" if arguments else "mend the factory"
        raise UsageError(f"file:{reference}: calling it raised {type(error).__name__}: {error}", fix) from error
    if isinstance(made, Encoder):
        if not getattr(made, "facts", None) or not made.facts.sha256:
            raise UsageError(f"file:{reference}: its encoder has no facts with a sha256", "see docs/custom-encoders.md")
        return made
    if not isinstance(made, nn.Module):
        raise UsageError(f"file:{reference}: gives a {type(made).__name__}", "give an Encoder or an nn.Module")
    side = int(getattr(made, "resolution", 224))
    module = _Maps(made.eval(), f"file:{reference}")
    try:
        with torch.inference_mode():
            maps = module(torch.zeros(1, 3, side, side))
    except RiceEvalError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UsageError(
            f"file:{reference}: forward on (1, 3, {side}, {side}) raised {type(error).__name__}: {error}",
            "mend the module, or set its attribute 'resolution'",
        ) from error
    for number, m in enumerate(maps, start=1):
        if m.shape[2] != m.shape[3] or side % m.shape[2]:
            raise UsageError(
                f"file:{reference}: map {number} is {m.shape[2]} x {m.shape[3]} for {side} x {side} px",
                "a map's sides must divide the image's; set the attribute 'resolution' to a side that fits",
            )
    strides = tuple(side // int(m.shape[2]) for m in maps)
    facts = describe(
        request,
        made,
        arch=f"{path.name}:{attribute}",
        architecture={"kind": "file", "code": hashlib.sha256(path.read_bytes()).hexdigest(), "factory": attribute},
        patch=max(strides),
        resolution=side,
        widths=tuple(int(m.shape[1]) for m in maps),
        strides=strides,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        source=f"{path.name}:{attribute}" + (f" with {request.weights.name}" if request.weights else ""),
        license=getattr(made, "license", None),
        notes=("the module normalises images itself; norm changes nothing",),
    )
    return MapEncoder(module, facts)
