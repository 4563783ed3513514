"""The hub, reached or not: no minute of retries before an error that one look can tell."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

__all__ = ["cache_only_when_unreachable", "why_not"]

_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
_SECONDS = 5.0  # to resolve and reach the host; a slow network answers a handshake well within that


def _reachable(endpoint: str) -> bool:
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_SECONDS):
            return True
    except OSError:
        return False


@contextmanager
def cache_only_when_unreachable() -> Iterator[None]:
    """Let the hub's client read its cache alone where the hub can't be reached, as ``HF_HUB_OFFLINE=1`` would.

    Behind a proxy the host need not be reachable from here, so nothing is changed. Nor is it without the client.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    if before or any(os.environ.get(name) for name in _PROXIES) or _reachable(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# Names of the hub client's errors, the most exact first, and what they mean to a user.
_MEANINGS = {
    "GatedRepoError": "the repository is gated",
    "RevisionNotFoundError": "the repository has no such revision",
    "RepositoryNotFoundError": "the repository does not exist, or is private",
    "LocalEntryNotFoundError": "they are not in the cache and the hub can't be reached",
    "OfflineModeIsEnabled": "they are not in the cache and the hub is not asked (HF_HUB_OFFLINE)",
}


def why_not(error: BaseException) -> str:
    """Why a download failed, in few words: the hub client's reason wherever in the chain of causes it is."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for name, meaning in _MEANINGS.items():
        if any(type(e).__name__ == name for e in chain):
            return meaning
    return f"{type(error).__name__}: {error}"[:300]
