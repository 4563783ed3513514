"""Region features of any encoder: its own region head, RoIAlign of patch tokens, or the mean of tokens under a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters.base import Encoder, HasRegionFeatures, Tokens
from rice_eval.errors import PlanError, UsageError

__all__ = ["How", "mask_pool", "region_features", "roi_align_tokens"]

How = Literal["prompter", "roialign", "mask"]


def _grid_map(tokens: Tokens, layer: int | None) -> Tensor:
    """``(B, D, h, w)`` map of one layer's patch tokens; the deepest layer present where ``layer`` is None."""
    number = max(tokens.patches) if layer is None else layer
    if number not in tokens.patches:
        raise PlanError(
            f"layer {number} was not encoded", f"layers at hand: {', '.join(map(str, sorted(tokens.patches)))}"
        )
    h, w = tokens.grids[number]
    patches = tokens.patches[number]
    return patches.transpose(1, 2).reshape(patches.shape[0], patches.shape[2], h, w)


def _check_boxes(boxes: Sequence[Tensor], batch: int) -> None:
    if len(boxes) != batch:
        raise UsageError(f"region features: {len(boxes)} lists of boxes for {batch} images", "give one tensor an image")
    for i, b in enumerate(boxes):
        if b.ndim != 2 or b.shape[1] != 4 or not b.is_floating_point():
            raise UsageError(f"region features: boxes of image {i} are {b.dtype} {tuple(b.shape)}, not float (n, 4)")
        if not torch.isfinite(b).all() or bool((b < 0).any() or (b > 1).any()):
            raise UsageError(
                f"region features: boxes of image {i} leave 0 to 1", "divide xyxy by the image's sides, and clip"
            )
        if bool((b[:, 2:] <= b[:, :2]).any()):
            raise UsageError(f"region features: image {i} has a box without area", "drop such boxes")


def roi_align_tokens(
    tokens: Tokens,
    boxes: Sequence[Tensor],
    *,
    layer: int | None = None,
    output_size: int = 1,
    sampling_ratio: int = 0,
) -> list[Tensor]:
    """RoIAlign on the token grid with half-pixel alignment (``torchvision.ops.roi_align(aligned=True)``, arXiv 1703.06870).

    Args:
        tokens: of B images.
        boxes: for each image ``(n, 4)`` xyxy, 0 to 1 of the encoded image's sides.
        layer: which layer; the deepest present where None.
        output_size: bins a side, averaged at the end; 1 is the mean over the box.
        sampling_ratio: bilinear samples a side of each bin; 0 takes one a token that the bin spans, rounded up.

    Returns:
        For each image ``(n, D)``.

    Raises:
        UsageError: boxes of another shape, outside the image, or without area.
        PlanError: a layer that was not encoded.
    """
    from torchvision.ops import roi_align

    grid = _grid_map(tokens, layer)
    _check_boxes(boxes, grid.shape[0])
    h, w = grid.shape[2:]
    scale = torch.tensor([w, h, w, h], dtype=grid.dtype, device=grid.device)
    scaled = [b.to(grid.device, grid.dtype) * scale for b in boxes]
    pooled = roi_align(grid, scaled, output_size, spatial_scale=1.0, sampling_ratio=sampling_ratio, aligned=True)
    return list(pooled.mean(dim=(2, 3)).split([len(b) for b in boxes]))


def mask_pool(tokens: Tokens, masks: Sequence[Tensor], *, layer: int | None = None) -> list[Tensor]:
    """The mean of patch tokens, each weighted by the share of its area that the mask covers.

    Args:
        tokens: of B images.
        masks: for each image ``(n, H, W)`` bool, or float in 0 to 1, over the whole encoded image at any resolution.
        layer: which layer; the deepest present where None.

    Returns:
        For each image ``(n, D)``.

    Raises:
        UsageError: masks of another shape, or a mask that covers nothing.
        PlanError: a layer that was not encoded.
    """
    grid = _grid_map(tokens, layer)
    if len(masks) != grid.shape[0]:
        raise UsageError(
            f"region features: {len(masks)} stacks of masks for {grid.shape[0]} images", "give one an image"
        )
    out = []
    for i, mask in enumerate(masks):
        if mask.ndim != 3:
            raise UsageError(f"region features: masks of image {i} are {tuple(mask.shape)}, not (n, H, W)")
        weights = _area(mask.to(grid.device, torch.float32), grid.shape[2], grid.shape[3])
        total = weights.sum(dim=(1, 2))
        if bool((total <= 0).any()):
            raise UsageError(f"region features: image {i} has a mask that covers nothing", "drop empty masks")
        pooled = torch.einsum("nhw,dhw->nd", weights, grid[i].float()) / total[:, None]
        out.append(pooled.to(grid.dtype))
    return out


def _area(mask: Tensor, h: int, w: int) -> Tensor:
    """``(n, H, W)`` to ``(n, h, w)``: the exact share of each cell that is covered, whatever the two sizes."""
    height, width = int(mask.shape[1]), int(mask.shape[2])
    if height % h == 0 and width % w == 0:
        return F.avg_pool2d(mask[:, None], (height // h, width // w))[:, 0]
    return _overlaps(h, height, mask) @ mask @ _overlaps(w, width, mask).T


def _overlaps(cells: int, pixels: int, like: Tensor) -> Tensor:
    """``(cells, pixels)``: the share of each cell's length that each pixel covers."""
    cell = torch.arange(cells, device=like.device, dtype=torch.float64)[:, None] * (pixels / cells)
    pixel = torch.arange(pixels, device=like.device, dtype=torch.float64)[None]
    low, high = torch.maximum(cell, pixel), torch.minimum(cell + pixels / cells, pixel + 1)
    return ((high - low).clamp(min=0) * (cells / pixels)).to(like.dtype)


def region_features(
    encoder: Encoder,
    tokens: Tokens,
    boxes: Sequence[Tensor],
    how: How = "roialign",
    *,
    masks: Sequence[Tensor] | None = None,
    layer: int | None = None,
) -> list[Tensor]:
    """Features of regions, one tensor an image.

    Args:
        encoder: who made ``tokens``.
        tokens: of B images.
        boxes: for each image ``(n, 4)`` xyxy, 0 to 1 of the encoded image's sides; not read where ``how`` is ``mask``.
        how: ``prompter`` (the encoder's own region head), ``roialign`` (mean over the box by bilinear samples of the token
            grid, one sample a token) or ``mask`` (mean over ``masks``).
        masks: for each image ``(n, H, W)``; needed where ``how`` is ``mask``.
        layer: which layer; the deepest present where None. A prompter chooses its own.

    Raises:
        PlanError: ``prompter`` of an encoder that has none.
        UsageError: boxes or masks that can't be taken.
    """
    if how == "prompter":
        if not isinstance(encoder, HasRegionFeatures):
            raise PlanError(f"encoder '{encoder.name}' has no region head of its own", "use roialign or mask")
        _check_boxes(boxes, tokens.last.shape[0])
        return encoder.region_features(tokens, list(boxes))
    if how == "roialign":
        return roi_align_tokens(tokens, boxes, layer=layer)
    if how == "mask":
        if masks is None:
            raise UsageError("region features by mask need masks", "give masks=")
        return mask_pool(tokens, masks, layer=layer)
    raise UsageError(f"region features: '{how}' is not known", "use prompter, roialign or mask")
