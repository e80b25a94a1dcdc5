"""Before any route: who may come in, by which name of this machine, and how much they may bring."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

from loratune.serve.wire import error_of

# The page asks for the key itself, and who only wants to know whether the server lives has none.
_OPEN = frozenset({"/", "/health"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class Gate:
    """Before any route.

    Args:
        api_key: what callers must show, or None. largest: bytes of a body at most.
        most: requests at once. patience: seconds that a body may take to come.
        hosts: the names by which the server may be called; None for any. Behind a name of its own that leads to this
            machine, a foreign page would be of one origin with the server (DNS rebinding).
    """

    def __init__(
        self,
        app: Any,
        api_key: str | None,
        largest: int,
        most: int,
        hosts: Collection[str] | None = None,
        patience: float = 30.0,
    ) -> None:
        self._app, self._key, self._largest, self._most, self._patience = app, api_key, largest, most, patience
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._inside = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._let_in(headers, scope, receive, send)
        finally:
            self._inside -= 1

    async def _let_in(self, headers: Mapping[bytes, bytes], scope: Any, receive: Any, send: Any) -> None:
        try:
            body = await asyncio.wait_for(self._read(headers, receive), self._patience)
        except _GoneError:
            return
        except TimeoutError:
            # Nothing more is read of this connection: what follows would be taken for another request.
            refusal = _refusal(408, f"the body did not come within {self._patience:g} seconds", Connection="close")
            await refusal(scope, receive, send)
            return
        if body is None:
            refusal = _refusal(413, f"a body of more than {self._largest:,} bytes")
            await refusal(scope, receive, send)
        else:
            await self._app(scope, _told_again(body, receive), send)

    def _refusal(self, scope: Any, headers: Mapping[bytes, bytes]) -> JSONResponse | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts is not None and _name_of(host) not in self._hosts:
            return _refusal(403, f"this server is not called {host!r}; its names are {', '.join(sorted(self._hosts))}")
        if self._key is not None and scope["path"] not in _OPEN:
            scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(shown.strip(), self._key.encode()):
                said = error_of("the API key is missing or wrong", "invalid_api_key", code="invalid_api_key")
                return JSONResponse(said, 401, headers={"WWW-Authenticate": "Bearer"})
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and scope["method"] not in _READING and _address_of(origin) != host:
            return _refusal(403, f"a page of {origin} may not ask this server")
        if self._inside >= self._most and scope["path"] not in _OPEN:
            said = error_of(f"{self._inside} requests are being answered; ask again later", "server_error")
            return JSONResponse(said, 503, headers={"Retry-After": "1"})
        return None

    async def _read(self, headers: Mapping[bytes, bytes], receive: Callable[[], Awaitable[Any]]) -> bytes | None:
        """The whole body, or None where it is larger than may be; raises where who sends it has gone."""
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._largest:
            return None
        parts, taken = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            parts.append(message.get("body", b""))
            taken += len(parts[-1])
            if taken > self._largest:
                return None
            if not message.get("more_body"):
                return b"".join(parts)


class _GoneError(Exception):
    """Who was sending a body has gone."""


def _told_again(body: bytes, receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return first.pop() if first else await receive()

    return again


def _name_of(host: str) -> str:
    """Without the port, and an address of IPv6 without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _address_of(origin: str) -> str | None:
    """Host and port of an origin; None where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _refusal(status: int, message: str, **headers: str) -> JSONResponse:
    return JSONResponse(error_of(message, "invalid_request_error"), status, headers=headers)
