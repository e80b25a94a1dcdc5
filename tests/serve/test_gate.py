"""Before any route: who may come in, by which name of this machine, and how much they may bring."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loratune.serve.gate import Gate
from tests.serve.conftest import Shelf, asked_here, service

KNOWN = {"authorization": "Bearer secret"}
PROMPT = {"model": "a", "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def locked(shelf: Shelf) -> Iterator[httpx.Client]:
    with asked_here(service(shelf, "a", api_key="secret")) as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/reports/a", "/openapi.json", "/metrics", "/v1/models", "/v1", "/nowhere", "//v1/models", "/docs"]
)
def test_the_key_is_asked_for_everywhere(locked: httpx.Client, path: str) -> None:
    found = locked.get(f"http://localhost{path}")
    assert found.status_code == 401
    assert found.json()["error"]["type"] == "invalid_api_key"
    assert found.headers["www-authenticate"] == "Bearer"
    assert locked.get(f"http://localhost{path}", headers=KNOWN).status_code in (200, 404)


@pytest.mark.parametrize("path", ["/", "/health"])
def test_the_page_and_health_need_no_key(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


@pytest.mark.parametrize(
    ("shown", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("BEARER  secret", 200),
        ("secret", 401),
        ("Basic secret", 401),
        ("Bearer", 401),
        ("Bearer secrets", 401),
        ("Bearer sécret", 401),
    ],
)
def test_how_the_key_is_shown(locked: httpx.Client, shown: str, status: int) -> None:
    assert locked.get("/v1/models", headers={"authorization": shown.encode("latin-1")}).status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:99", 200),
        ("[::1]:8000", 200),
        ("127.0.0.5", 200),  # what was given to listen on
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("", 403),
    ],
)
def test_by_which_name_it_is_called(shelf: Shelf, host: str, status: int) -> None:
    with asked_here(service(shelf, "a", host="127.0.0.5")) as client:
        for path in ("/v1/models", "/", "/health"):
            found = client.get(path, headers={"host": host})
            assert found.status_code == status
        if status == 403:
            assert "is not called" in client.get("/v1/models", headers={"host": host}).json()["error"]["message"]


def test_on_the_network_any_name_will_do(shelf: Shelf) -> None:
    with asked_here(service(shelf, "a", host="0.0.0.0")) as client:
        assert client.get("/v1/models", headers={"host": "gpu.example"}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost", 200),
        ("http://localhost:3000", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        ("http://[x]:1", 403),
    ],
)
def test_pages_of_others_may_not_ask(shelf: Shelf, origin: str | None, status: int) -> None:
    with asked_here(service(shelf, "a")) as client:
        headers = {} if origin is None else {"origin": origin}
        assert client.post("/v1/completions", json=PROMPT, headers=headers).status_code == status


def test_the_page_allows_itself_only(shelf: Shelf) -> None:
    with asked_here(service(shelf, "a")) as client:
        policy = client.get("/").headers["content-security-policy"]
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert "unsafe-inline" not in scripts
    for part in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
        assert part in policy


# -- reports -----------------------------------------------------------------------------------------------------------


def test_a_report_is_shown_and_may_do_nothing(shelf: Shelf) -> None:
    report = shelf.adapters / "b" / "report.html"
    report.write_text("<!doctype html><script>1</script>")
    try:
        with asked_here(service(shelf, "b")) as client:
            found = client.get("/reports/b")
            assert found.text == report.read_text()
            policy = found.headers["content-security-policy"].split("; ")
            assert policy[0] == "sandbox"
            assert "default-src 'none'" in policy
            assert not any(part.startswith("script-src") for part in policy)
    finally:
        report.unlink()


def test_a_report_that_leads_elsewhere_is_none(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "secret.html").write_text("secret")
    report = shelf.adapters / "b" / "report.html"
    report.symlink_to(tmp_path / "secret.html")
    try:
        with asked_here(service(shelf, "b")) as client:
            assert client.get("/reports/b").status_code == 404
            listed = client.get("/v1/models").json()["data"]
            assert [one["report"] for one in listed if one["id"] == "b"] == [False]
    finally:
        report.unlink()


# -- what they bring ---------------------------------------------------------------------------------------------------


def test_who_goes_before_the_body_has_ended_asked_nothing() -> None:
    came: list[bytes] = []

    async def app(_: Any, receive: Any, __: Any) -> None:
        came.append((await receive())["body"])

    def told(*messages: dict[str, Any]) -> None:
        left = list(messages)

        async def receive() -> dict[str, Any]:
            return left.pop(0)

        async def send(_: Any) -> None:
            raise AssertionError("nobody is there")

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        asyncio.run(Gate(app, None, 100, 1)(scope, receive, send))

    half = {"type": "http.request", "body": b'{"model": "a"', "more_body": True}
    told(half, {"type": "http.disconnect"})
    assert came == []
    told(half, {"type": "http.request", "body": b"}"})
    assert came == [b'{"model": "a"}']


def test_more_at_once_than_are_let_in_are_told_so() -> None:
    """In the words of all refusals, and only as long as the others are inside."""
    go_on = asyncio.Event()

    async def app(_: Any, __: Any, send: Any) -> None:
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    gate = Gate(app, None, 100, 2)

    async def status(path: str) -> int:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await gate({"type": "http", "method": "GET", "path": path, "headers": []}, receive, send)
        if sent[0]["status"] == 503:
            assert b'"server_error"' in sent[1]["body"]
            assert (b"retry-after", b"1") in sent[0]["headers"]
        return int(sent[0]["status"])

    async def several() -> list[int]:
        inside = [asyncio.ensure_future(status("/v1/models")) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await status("/v1/models")
        health = asyncio.ensure_future(status("/health"))
        await asyncio.sleep(0)
        go_on.set()
        return [refused, await health, *(await asyncio.gather(*inside)), await status("/v1/models")]

    assert asyncio.run(several()) == [503, 200, 200, 200, 200]


def test_a_body_that_does_not_come_makes_way() -> None:
    """Else as many half ones as are let in would keep all others out."""

    async def app(*_: Any) -> None:
        raise AssertionError("nothing was asked")

    gate, sent = Gate(app, None, 100, 1, patience=0.05), list[dict[str, Any]]()
    half = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> dict[str, Any]:
        return half.pop() if half else await asyncio.Event().wait()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(gate({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send))
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert gate._inside == 0
