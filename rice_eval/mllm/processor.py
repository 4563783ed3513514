"""What a checkpoint's processor files say of tiles, colours and the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rice_eval.adapters.checkpoints import read_json
from rice_eval.errors import CheckpointError
from rice_eval.mllm.scaling import Scaler
from rice_eval.mllm.tiling import Size, Tiling

__all__ = ["chat_template", "image_processor", "tiling_of"]

#: Qwen2VLImageProcessor's own, where its file names none: 4 and 1280 merged tokens of 28 px.
_SMART_RANGE = (56 * 56, 28 * 28 * 1280)
_RESAMPLE: dict[int, Literal["bicubic", "bilinear"]] = {3: "bicubic", 2: "bilinear"}  # PIL's numbers


def image_processor(folder: Path) -> dict[str, Any]:
    """The image processor's settings beside a checkpoint; empty where there are none.

    Raises:
        CheckpointError: a file that is no JSON object.
    """
    whole = read_json(folder / "processor_config.json") or {}
    inside = whole.get("image_processor")
    return inside if isinstance(inside, dict) else read_json(folder / "preprocessor_config.json") or {}


def chat_template(folder: Path) -> str | None:
    """The multimodal chat template beside a checkpoint; None leaves it to the tokenizer."""
    told = read_json(folder / "chat_template.json") or {}
    found = told.get("chat_template") or (read_json(folder / "processor_config.json") or {}).get("chat_template")
    if isinstance(found, str):
        return found
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def tiling_of(
    folder: Path,
    kind: str,
    side: int,
    pinpoints: tuple[Size, ...],
    max_tiles: int | None,
    scaler: Scaler,
) -> Tiling:
    """How a published model's processor cuts images.

    Args:
        folder: of the checkpoint.
        kind: ``llava``, ``llava_next``, ``llava_onevision`` or ``llavaonevision1_5``.
        side: of the vision configuration, in pixels; for ``llavaonevision1_5`` what a merged token covers.
        pinpoints, max_tiles: of the model's configuration.
        scaler: what scales; the files do not tell.

    Raises:
        CheckpointError: a processor that does something else, or does not fit the model.
    """
    told = image_processor(folder)
    where = f"{folder}: the image processor"
    number = told.get("resample", 3)
    if number not in _RESAMPLE:
        raise CheckpointError(
            f"{where} scales with PIL's method {number}", "only bicubic (3) and bilinear (2) are known"
        )
    resample = _RESAMPLE[number]
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        if told.get(switch, True) is not True:
            raise CheckpointError(f"{where} says {switch} = {told[switch]}", "such models can't be run here")
    if kind == "llavaonevision1_5":
        return Tiling("single", side, "smart", scaler=scaler, resample=resample, pixel_range=_range(told, where))
    found = _side(told, side, where)
    if found != side:
        raise CheckpointError(
            f"{where} makes tiles of {found} px, the model takes {side}", "one of the two is another's"
        )
    if kind == "llava":
        by = "pad" if told.get("do_pad") else "crop" if told.get("do_center_crop", True) else "squash"
        return Tiling("single", side, by, scaler=scaler, resample=resample)
    listed = told.get("image_grid_pinpoints")
    if listed is not None and tuple((int(h), int(w)) for h, w in listed) != pinpoints:
        raise CheckpointError(
            f"{where} and config.json name different image_grid_pinpoints", "one of the two is another model's"
        )
    several: Literal["tiles", "pad"] = "pad" if kind == "llava_onevision" else "tiles"
    return Tiling(
        "anyres", side, pinpoints=pinpoints, max_tiles=max_tiles, scaler=scaler, resample=resample, several=several
    )


def _side(told: dict[str, Any], usual: int, where: str) -> int:
    sides: set[int] = set()
    for key in ("size", "crop_size"):
        value = told.get(key)
        if isinstance(value, int):
            sides.add(value)
        elif isinstance(value, dict):
            sides |= {int(value[k]) for k in ("height", "width", "shortest_edge") if value.get(k)}
    if len(sides) > 1:
        raise CheckpointError(
            f"{where} has several sides ({', '.join(map(str, sorted(sides)))} px)",
            "only square tiles of one size can be run",
        )
    return sides.pop() if sides else usual


def _range(told: dict[str, Any], where: str) -> tuple[int, int]:
    size = told.get("size") if isinstance(told.get("size"), dict) else {}
    fewest = told.get("min_pixels") or (size or {}).get("shortest_edge") or _SMART_RANGE[0]
    most = told.get("max_pixels") or (size or {}).get("longest_edge") or _SMART_RANGE[1]
    if not (isinstance(fewest, int) and isinstance(most, int) and 1 <= fewest <= most):
        raise CheckpointError(f"{where} keeps images within {fewest} to {most} pixels", "mend preprocessor_config.json")
    return fewest, most
