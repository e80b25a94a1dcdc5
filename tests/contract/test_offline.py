"""Tests need no network: the guard of tests/conftest.py refuses other machines and lets this one through."""

from __future__ import annotations

import os
import socket

import pytest


def test_hub_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("connect", ["connect", "connect_ex"])
def test_remote_connection_is_refused(connect: str) -> None:
    with socket.socket() as sock, pytest.raises(RuntimeError, match="need no network"):
        getattr(sock, connect)(("192.0.2.1", 80))  # TEST-NET-1, RFC 5737: routed nowhere


def test_local_connection_is_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass
