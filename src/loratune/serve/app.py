"""The routes: what comes in is checked, asked of the worker, and told in OpenAI's words."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse

from loratune.errors import AdapterFileError, AdapterStateError, TargetError
from loratune.serve.answering import answered, refuse_many
from loratune.serve.gate import Gate
from loratune.serve.library import UnknownNameError
from loratune.serve.prompts import chat_prompt, text_prompts
from loratune.serve.refusals import add_refusals
from loratune.serve.service import Service
from loratune.serve.wire import ChatBody, LoadBody, TextBody, UnloadBody, error_of, model_of

_PAGE = Path(__file__).parent / "page.html"
_REPORT = "report.html"
# Requests beside those that are answered or wait: lists, metrics, and who is told to come again.
_OTHERS = 32
# A report is a file of a run folder, which may come from anywhere: it is shown, and cannot act as this server's page.
_REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def make_app(service: Service) -> FastAPI:
    """The application; its worker starts and ends with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop, service.grace)

    app = FastAPI(title="loratune", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Gate,
        api_key=service.api_key,
        largest=service.largest,
        most=service.worker.most + _OTHERS,
        hosts=service.hosts,
    )
    add_refusals(app)
    _pages(app, service)
    _models(app, service)
    _completions(app, service)
    return app


# -- routes ------------------------------------------------------------------------------------------------------------


def _pages(app: FastAPI, service: Service) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        text, policy = _page()
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @app.get("/reports/{name}", include_in_schema=False)
    async def report(name: str) -> Response:
        found = _report_of(service.library.folders.get(name))
        if found is None:
            return JSONResponse(error_of(f"{name!r} has no report", "invalid_request_error"), 404)
        headers = {"Content-Security-Policy": _REPORT_POLICY, "X-Content-Type-Options": "nosniff"}
        return FileResponse(found, media_type="text/html", headers=headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        worker = service.worker
        status = "ok" if worker.alive else "ending" if worker.fatal is None else "failed"
        return JSONResponse({"status": status}, 200 if worker.alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(service.worker), media_type=service.metrics.media_type)


@cache
def _page() -> tuple[str, str]:
    """The page and its policy: its own script and no other, nothing from elsewhere, and in nobody's frame."""
    text = _PAGE.read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Reports that are opened with the key inherit it: hence the styles, and no digest for them.
    return text, (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


def _report_of(folder: Path | None) -> Path | None:
    """A run's report, if it stands in the folder itself: a link may lead anywhere."""
    if folder is None:
        return None
    found = (folder / _REPORT).resolve()
    return found if found.is_file() and found.is_relative_to(folder.resolve()) else None


def _models(app: FastAPI, service: Service) -> None:
    def listed() -> list[dict[str, Any]]:
        base, created = service.library.base, service.started
        found = [model_of(base, parent=None, created=created)]
        for name, folder in service.library.folders.items():
            one = model_of(name, parent=base, created=created)
            found.append({**one, "report": _report_of(folder) is not None})
        return found

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": listed()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        found = next((one for one in listed() if one["id"] == name), None)
        if found is None:
            raise UnknownNameError(f"no model {name!r}", hint="GET /v1/models lists them")
        return found

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadBody) -> dict[str, str]:
        folder = _allowed(body.lora_path, service.allowed)
        try:
            await service.worker.do(lambda: service.library.add(body.lora_name, folder))
        except (AdapterFileError, TargetError) as error:
            # Where on this machine it lies is not for who asks to know.
            told = [problem.replace(str(folder), body.lora_path) for problem in error.problems]
            raise type(error)(told, hint=error.hint) from error
        return {"status": "loaded", "model": body.lora_name}

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadBody) -> dict[str, str]:
        await service.worker.do(lambda: service.library.remove(body.lora_name))
        return {"status": "unloaded", "model": body.lora_name}


def _allowed(path: str, allowed: Path | None) -> Path:
    """The folder, if it and all in it stand inside the one from which adapters may be loaded, links followed."""
    if allowed is None:
        raise AdapterStateError("adapters are not loaded by request here", hint="start with --adapter-dir FOLDER")
    try:
        folder, inside = (allowed / path).resolve(), allowed.resolve()
        found = (folder, *folder.iterdir())  # adapters are read from files of the folder itself
        if all(one.resolve().is_relative_to(inside) for one in found):
            return folder
    except (OSError, ValueError, RuntimeError):  # a zero byte, a loop of links
        pass
    raise AdapterStateError(f"{path!r} is no folder inside the one for adapters", hint="name one relative to it")


def _completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        prompts = await asyncio.to_thread(chat_prompt, service.tokenizer, body)
        return await answered(service, request, body, prompts, body.most, body.alternatives)

    @app.post("/v1/completions")
    async def complete(body: TextBody, request: Request) -> Response:
        refuse_many(service, len(body.prompts))
        prompts = await asyncio.to_thread(text_prompts, service.tokenizer, body.prompts)
        return await answered(service, request, body, prompts, body.max_tokens, body.logprobs)
