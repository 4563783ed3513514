"""The hub out of reach: the cache alone, at once, and a reason in few words."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from rice_eval.adapters import network

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in network._PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def _refuse(*_args: Any, **_kwargs: Any) -> Any:
    raise OSError("no route")


def test_unreachable_means_offline_for_as_long_as_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", _refuse)
    with network.cache_only_when_unreachable():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_behind_a_proxy_nothing_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", _refuse)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    with network.cache_only_when_unreachable():
        assert not constants.HF_HUB_OFFLINE


def test_a_host_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with network.cache_only_when_unreachable():
            assert not constants.HF_HUB_OFFLINE


def test_the_reason_is_found_in_the_chain() -> None:
    class GatedRepoError(Exception):
        pass

    outer = RuntimeError("wrapped")
    outer.__cause__ = GatedRepoError("401 long text")
    assert network.why_not(outer) == "the repository is gated"
    assert network.why_not(ValueError("x")) == "ValueError: x"
