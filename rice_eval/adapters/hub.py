"""Where a checkpoint's files come from: ``--weights``, or the hub's cache or download."""

from __future__ import annotations

from pathlib import Path

from rice_eval.adapters.base import LoadRequest
from rice_eval.errors import CheckpointError, MissingExtraError

__all__ = ["locate"]

_SMALL = ["*.json", "*.txt", "*.model"]


def locate(request: LoadRequest) -> str | Path:
    """The path to open for a request; a hub repository is downloaded whole or not used.

    A local folder in the card's ``hub`` field is taken as it is. ``HF_HUB_OFFLINE=1`` is respected: only the cache is read.

    Raises:
        CheckpointError: no source, a gated or missing repository, no network and nothing in the cache.
        MissingExtraError: huggingface_hub is not installed.
    """
    if request.weights is not None:
        return request.weights
    source = request.card.source
    if source.hub is None:
        private = "" if request.card.public else ": its weights are not public"
        raise CheckpointError(
            f"encoder '{request.card.name}' has no weights to download{private}",
            "give your own with --weights PATH",
        )
    local = Path(source.hub).expanduser()
    if local.exists():
        return local / source.subfolder if source.subfolder else local
    if source.hub.count("/") != 1 or source.hub.startswith((".", "/", "~")):
        raise CheckpointError(f"{source.hub}: no such folder, and no name of a hub repository", "check the path")
    folder = _download(source.hub, source.revision, source.file, source.subfolder)
    if source.file:
        return folder / source.file
    return folder / source.subfolder if source.subfolder else folder


def _download(repo: str, revision: str | None, file: str | None, subfolder: str | None) -> Path:
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError.of("huggingface_hub", "transformers", f"downloading '{repo}'") from error
    at = f"{subfolder}/" if subfolder else ""
    patterns = [at + p for p in _SMALL]

    def fetch(weights: list[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*patterns, *weights]))

    try:
        if file:
            return fetch([file])
        folder = fetch([at + "model*.safetensors"])
        if not any((folder / at).glob("model*.safetensors")):  # older repositories hold only the torch format
            folder = fetch([at + "pytorch_model*.bin"])
    except hub.GatedRepoError as error:
        raise CheckpointError(
            f"hub repository '{repo}' is gated", "accept its terms on its page and log in, or give --weights PATH"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"hub repository '{repo}' has no revision '{revision}'", "correct the card") from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"hub repository '{repo}' does not exist, or is private", "check the name, log in, or give --weights PATH"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"hub repository '{repo}' is not in the cache and the hub can't be reached",
            "download it on a machine with network, unset HF_HUB_OFFLINE, or give --weights PATH",
        ) from error
    except Exception as error:  # the hub client raises its transport's errors, which differ by version
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise CheckpointError(
            f"hub repository '{repo}' can't be downloaded ({reason})", "give --weights PATH"
        ) from error
    return folder
