"""A stand-in for ``mmcv._ext``, mmcv's compiled operators, where ``mmcv-lite`` is installed.

mmseg and mmdet import the module even where they use none of its operators. Here ``nms`` and ``roi_align`` (average pooling) call
torchvision's, which give the same numbers; any other operator raises NotImplementedError when it is called.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["stand_in"]

NAME = "mmcv._ext"


def stand_in() -> bool:
    """Register the stand-in unless the compiled module exists. True where it now serves, or did before.

    Does nothing where mmcv itself is missing: the import that follows says so.
    """
    present = sys.modules.get(NAME)
    if present is not None:
        return isinstance(present, _Operators)
    if importlib.util.find_spec("mmcv") is None or importlib.util.find_spec(NAME) is not None:
        return False
    sys.modules[NAME] = _Operators()
    return True


class _Operators(ModuleType):
    def __init__(self) -> None:
        super().__init__(NAME, __doc__)
        self.__spec__ = importlib.machinery.ModuleSpec(NAME, loader=None)
        self.nms = _nms
        self.roi_align_forward = _roi_align_forward
        self.roi_align_backward = _roi_align_backward

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: object, **__: object) -> Any:
            raise NotImplementedError(
                f"mmcv's operator '{name}' is compiled code that mmcv-lite lacks; build mmcv 2.1.0 from source to use it"
            )

        return missing


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Rows kept, best first; ``offset`` 1 counts a box's last pixel in, as mmcv's."""
    grown = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    out: Tensor = torch.ops.torchvision.nms(grown, scores, iou_threshold)
    return out


def _check_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError("roi_align with max pooling needs compiled mmcv")


def _roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills ``output``; the argmaxes belong to max pooling."""
    _check_average(pool_mode)
    output.copy_(
        torch.ops.torchvision.roi_align(
            input, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def _roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills ``grad_input``."""
    _check_average(pool_mode)
    batch, channels, height, width = grad_input.shape
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output.contiguous(), rois, spatial_scale, aligned_height, aligned_width, batch, channels, height, width,
            sampling_ratio, aligned,
        )
    )  # fmt: skip
