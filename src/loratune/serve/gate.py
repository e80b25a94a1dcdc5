"""Before any route: who may come in, and how much they may bring."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.responses import JSONResponse

from loratune.serve.wire import error_of


class Gate:
    """Before any route: who may come in, and how much they may bring."""

    def __init__(self, app: Any, api_key: str | None, largest: int) -> None:
        self._app, self._key, self._largest = app, api_key, largest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        key = self._key
        if key is not None and scope["path"].startswith("/v1"):
            shown = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not secrets.compare_digest(shown, key.encode()):
                refusal = JSONResponse(error_of("the API key is missing or wrong", "invalid_api_key"), 401)
                await refusal(scope, receive, send)
                return
        try:
            declared = int(headers.get(b"content-length", b"0") or 0)
        except ValueError:
            declared = 0  # the body itself is counted
        body = None if declared > self._largest else await self._read(receive)
        if body is None:
            most = f"a body of more than {self._largest:,} bytes"
            await JSONResponse(error_of(most, "invalid_request_error"), 413)(scope, receive, send)
            return
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return first.pop() if first else await receive()

        await self._app(scope, again, send)

    async def _read(self, receive: Callable[[], Awaitable[Any]]) -> bytes | None:
        """The whole body, or None where it is larger than may be."""
        parts, taken = [], 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            taken += len(parts[-1])
            if taken > self._largest:
                return None
            if not message.get("more_body"):
                return b"".join(parts)
