"""Whether a model fits into memory, asked before it is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rice_eval.errors import PlanError

__all__ = ["check_fits", "free_bytes"]

#: Loading holds little more than the weights themselves (tensors are given to the model, not copied), and a forward pass
#: needs room beside them.
MARGIN = 1.15


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where the machine does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [n for n in (_meminfo(), _cgroup()) if n is not None]
    if found:
        return min(found)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup() -> int | None:
    """What the container may still take (control groups, version 2 and 1)."""
    for limit, used, stat, inactive in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            most, now = int((root / limit).read_text()), int((root / used).read_text())
            lines = dict(line.split() for line in (root / stat).read_text().splitlines())
            return max(0, most - now + int(lines.get(inactive, 0)))  # cached files make room when asked
        except (OSError, ValueError):
            continue
    return None


def check_fits(parameters: int, dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Refuse a model that the device can't hold.

    Args:
        parameters: of the model.
        dtype: they are loaded in.
        device: where they go.
        name: the model's, for the message.

    Raises:
        PlanError: it does not fit.
    """
    free = free_bytes(device)
    need = int(parameters * dtype.itemsize * MARGIN)
    if free is None or need <= free:
        return
    smaller = " in bfloat16 (--model takes --dtype)," if dtype.itemsize > 2 else ""
    raise PlanError(
        f"language model '{name}' has {parameters / 1e9:.2f} billion parameters and needs {need / 2**30:.1f} GiB in "
        f"{str(dtype)[6:]}, {free / 2**30:.1f} GiB are free on {device}",
        f"load it{smaller} on a larger machine, or choose a smaller language model",
    )
