"""What went wrong, in OpenAI's words: every answer that is none has one form."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from loratune.errors import LoratuneError
from loratune.serve.library import LostError, NoRoomError, UnknownNameError
from loratune.serve.wire import error_of
from loratune.serve.worker import BusyError, FailedError, StoppedError

_STATUS: dict[type[LoratuneError], int] = {
    UnknownNameError: 404,
    NoRoomError: 429,
    BusyError: 429,
    FailedError: 500,
    LostError: 500,
    StoppedError: 503,
}
_SHOWN = 20
_NO_JSON = "json_invalid"


def add_refusals(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(LoratuneError, _refused)  # type: ignore[arg-type]
    for status in (400, 404, 405):
        app.add_exception_handler(status, _not_served)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _unexpected)


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Every problem of a body, each with where it is."""
    problems, first = error.errors()[:_SHOWN], error.errors()[0]
    named = len(first["loc"]) > 1 and first["type"] != _NO_JSON
    param = str(first["loc"][1]) if named else None
    message = "; ".join(_sentence(problem) for problem in problems)
    return JSONResponse(error_of(message, "invalid_request_error", param=param), 400)


def _sentence(problem: dict[str, Any]) -> str:
    place = problem["loc"][1:]
    if problem["type"] == _NO_JSON:
        return f"body: no JSON at character {place[0]}: {problem['ctx']['error']}"
    if not place and problem["type"] != "value_error":
        return f"body: {problem['msg']}; send a JSON object, with Content-Type: application/json"
    return f"{'.'.join(map(str, place)) or 'body'}: {problem['msg']}"


async def _refused(_: Request, error: LoratuneError) -> JSONResponse:
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 400)
    kind = "invalid_request_error" if status < 429 else "overloaded" if status == 429 else "server_error"
    code = "model_not_found" if isinstance(error, UnknownNameError) else None
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_of(str(error), kind, code=code), status, headers=headers)


async def _not_served(request: Request, error: HTTPException) -> JSONResponse:
    """No such path, not by this method, or a body that cannot be read."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_of(message, "invalid_request_error"), error.status_code, headers=error.headers)


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    # What it says may hold paths or contents; the server's own log has it.
    return JSONResponse(error_of(f"the server failed ({type(error).__name__})", "server_error"), 500)
