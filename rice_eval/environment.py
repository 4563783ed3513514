"""Where a run happens: versions, machine, git state, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

from rice_eval import __version__

__all__ = ["PACKAGES", "describe", "git_state", "launched", "package_versions", "peak_memory_mb"]

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "safetensors",
    "timm",
    "transformers",
    "open_clip_torch",
    "onnx",
    "onnxruntime",
    "pycocotools",
    "mmsegmentation",
    "mmdet",
    "lmms-eval",
    "ray",
)
"""Packages whose version may change a number; those installed are named in every record."""


def package_versions() -> dict[str, str]:
    """Versions of the installed packages among ``PACKAGES``."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> str | None:
    """Commit of the clone this package runs from, with ``+dirty`` where files differ; None outside a clone."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+dirty", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def launched() -> tuple[int, int]:
    """``(rank, processes)`` of this process among those that ``torchrun`` started; ``(0, 1)`` without it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), processes) if processes > 1 else (0, 1)


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MiB, file mappings included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return round(peak / (1024 if sys.platform != "darwin" else 1024 * 1024), 1)


def describe(device: str, threads: int) -> dict[str, object]:
    """The fields of ``Environment``."""
    return {
        "rice_eval": __version__,
        "git": git_state(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": package_versions(),
        "device": device,
        "threads": threads,
    }
