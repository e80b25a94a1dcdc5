"""The routes: what comes in is checked, asked of the worker, and told in OpenAI's words."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse

from loratune.engine import Chosen, Sampling
from loratune.engine import Request as Asked
from loratune.errors import AdapterStateError, DataError, LoratuneError
from loratune.serve.gate import Gate
from loratune.serve.library import Library, NoRoomError, UnknownNameError
from loratune.serve.metrics import Metrics
from loratune.serve.text import Text
from loratune.serve.wire import (
    ChatBody,
    LoadBody,
    TextBody,
    Told,
    UnloadBody,
    error_of,
    logprobs_of,
    model_of,
    usage_of,
)
from loratune.serve.worker import Answers, BusyError, StoppedError, Worker

_STATUS: dict[type[LoratuneError], int] = {
    UnknownNameError: 404,
    NoRoomError: 429,
    BusyError: 429,
    StoppedError: 503,
}
_PAGE = Path(__file__).parent / "page.html"
# Nothing on the page comes from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


@dataclass
class Service:
    """What the routes have in common.

    Attributes:
        stop_ids: tokens that end an answer.
        allowed: the folder from which adapters may be loaded by request; none may without it.
        api_key: what callers must show, or None. largest: bytes of a request's body at most.
    """

    worker: Worker
    tokenizer: Any
    stop_ids: frozenset[int]
    allowed: Path | None = None
    api_key: str | None = None
    largest: int = 4 << 20
    grace: float = 30.0
    started: int = field(default_factory=lambda: int(time.time()))
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def library(self) -> Library:
        return self.worker.library


@dataclass
class _Call:
    """One request for text: its prompts, and what was said to them so far."""

    service: Service
    told: Told
    answers: Answers
    prompt_tokens: int
    texts: list[Text]
    alternatives: int | None
    chosen: list[list[Chosen]]
    begun: float

    async def pieces(self) -> AsyncIterator[tuple[int, str, list[Chosen]]]:
        """Prompt by number, new text and its tokens, until all have ended; raises what went wrong."""
        pending: list[list[Chosen]] = [[] for _ in self.texts]
        while any(text.finish is None for text in self.texts):
            heard = await self.answers.next()
            if isinstance(heard.what, LoratuneError):
                raise heard.what
            text = self.texts[heard.index]
            if text.finish is not None:
                continue  # its stop sequence has ended it already
            if not self.chosen[heard.index]:
                self.service.metrics.first_token(self.begun)
            self.chosen[heard.index].append(heard.what)
            pending[heard.index].append(heard.what)
            if heard.what.finish == "broken":
                raise StoppedError("the model gave no numbers (NaN)", hint="another adapter, or --dtype fp32")
            piece = text.add(heard.what)
            if piece or text.finish is not None:
                yield heard.index, piece, pending[heard.index]
                pending[heard.index] = []

    def logprobs(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if self.alternatives is None:
            return None
        return logprobs_of(self.service.tokenizer, chosen, chat=self.told.chat)

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(self.prompt_tokens, sum(map(len, self.chosen)))

    def end(self) -> None:
        self.service.worker.forget(self.answers)
        self.service.metrics.ended(self.prompt_tokens, sum(map(len, self.chosen)))


def make_app(service: Service) -> FastAPI:
    """The application; its worker starts and ends with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop, service.grace)

    app = FastAPI(title="loratune", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, api_key=service.api_key, largest=service.largest)
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(LoratuneError, _refused)  # type: ignore[arg-type]
    _pages(app, service)
    _models(app, service)
    _completions(app, service)
    return app


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Every problem of a body, each with where it is."""
    problems = [
        f"{'.'.join(str(part) for part in problem['loc'] if part != 'body') or 'body'}: {problem['msg']}"
        for problem in error.errors()
    ]
    first = error.errors()[0]["loc"]
    param = str(first[1]) if len(first) > 1 else None
    return JSONResponse(error_of("; ".join(problems[:20]), "invalid_request_error", param=param), 400)


async def _refused(_: Request, error: LoratuneError) -> JSONResponse:
    status = _status(error)
    kind = "invalid_request_error" if status < 429 else "overloaded" if status == 429 else "server_error"
    code = "model_not_found" if isinstance(error, UnknownNameError) else None
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_of(str(error), kind, code=code), status, headers=headers)


def _status(error: LoratuneError) -> int:
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 400)


# -- routes ------------------------------------------------------------------------------------------------------------


def _pages(app: FastAPI, service: Service) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})

    @app.get("/reports/{name}", include_in_schema=False)
    async def report(name: str) -> Response:
        folder = service.library.folders.get(name)
        if folder is None or not (folder / "report.html").is_file():
            return JSONResponse(error_of(f"{name!r} has no report", "invalid_request_error"), 404)
        return FileResponse(folder / "report.html", media_type="text/html")

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(service.worker), media_type=service.metrics.media_type)


def _models(app: FastAPI, service: Service) -> None:
    def listed() -> list[dict[str, Any]]:
        base, created = service.library.base, service.started
        found = [model_of(base, parent=None, created=created)]
        for name, folder in service.library.folders.items():
            one = model_of(name, parent=base, created=created)
            found.append({**one, "report": (folder / "report.html").is_file()})
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
        await service.worker.do(lambda: service.library.add(body.lora_name, folder))
        return {"status": "loaded", "model": body.lora_name}

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadBody) -> dict[str, str]:
        await service.worker.do(lambda: service.library.remove(body.lora_name))
        return {"status": "unloaded", "model": body.lora_name}


def _allowed(path: str, allowed: Path | None) -> Path:
    """The folder, if it stands inside the one from which adapters may be loaded, links followed."""
    if allowed is None:
        raise AdapterStateError("adapters are not loaded by request here", hint="start with --adapter-dir FOLDER")
    try:
        folder = (allowed / path).resolve()
        if folder.is_relative_to(allowed.resolve()) and folder.is_dir():
            return folder
    except (OSError, ValueError, RuntimeError):  # a zero byte, a loop of links
        pass
    raise AdapterStateError(f"{path!r} is no folder inside the one for adapters", hint="name one relative to it")


def _completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        prompt = await asyncio.to_thread(_chat_prompt, service.tokenizer, body)
        return await _answered(service, request, body, [prompt], body.most, body.alternatives, chat=True)

    @app.post("/v1/completions")
    async def complete(body: TextBody, request: Request) -> Response:
        prompts = [_text_prompt(service.tokenizer, prompt) for prompt in body.prompts]
        return await _answered(service, request, body, prompts, body.max_tokens, body.logprobs, chat=False)


def _chat_prompt(tokenizer: Any, body: ChatBody) -> tuple[int, ...]:
    if tokenizer.chat_template is None:
        raise DataError("this model has no chat template", hint="POST /v1/completions continues plain text")
    messages = [message.plain() for message in body.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tools=body.tools, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # noqa: BLE001 - templates raise what they like at messages that they do not take
        raise DataError(f"the chat template refuses these messages: {str(error)[:200]}") from None
    return _ids(tokenizer, text, add_special_tokens=False)


def _text_prompt(tokenizer: Any, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return _ids(tokenizer, prompt)
    wrong = [token for token in prompt if not 0 <= token < len(tokenizer)]
    if wrong:
        raise DataError(f"no token has the number {wrong[0]}", hint=f"they are 0 to {len(tokenizer) - 1}")
    return tuple(prompt)


def _ids(tokenizer: Any, text: str, **how: Any) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("the text holds half a surrogate pair, which is no character") from None
    return tuple(tokenizer(text, **how)["input_ids"])


async def _answered(
    service: Service,
    request: Request,
    body: ChatBody | TextBody,
    prompts: Sequence[tuple[int, ...]],
    most: int | None,
    alternatives: int | None,
    *,
    chat: bool,
) -> Response:
    if not prompts:
        raise DataError("prompt: it is empty", hint="give at least one")
    begun = time.perf_counter()
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    limit = service.worker.engine.longest if most is None else most

    def requests(adapter: str | None) -> list[Asked]:
        return [
            Asked(
                prompt,
                frozenset() if body.ignore_eos else service.stop_ids,
                Sampling(limit, body.temperature, body.top_p, (seed + number) % 2**63),
                adapter,
                alternatives,
            )
            for number, prompt in enumerate(prompts)
        ]

    answers = await service.worker.ask(body.model, requests)
    texts = [Text(service.tokenizer, body.stop or ()) for _ in prompts]
    told = Told(body.model, secrets.token_hex(12), chat=chat)
    tokens = sum(map(len, prompts))
    call = _Call(service, told, answers, tokens, texts, alternatives, [[] for _ in prompts], begun)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_events(call, usage=usage), media_type="text/event-stream")
    try:
        await _while_connected(request, _collect(call))
    finally:
        call.end()
    ended = [
        (text.written, text.finish, call.logprobs(chosen)) for text, chosen in zip(texts, call.chosen, strict=True)
    ]
    return JSONResponse(told.whole(ended, call.usage))


async def _collect(call: _Call) -> None:
    async for _ in call.pieces():
        pass


async def _while_connected(request: Request, work: Awaitable[None]) -> None:
    """Wait for the work, unless who asked for it has gone: then nobody needs it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        else:
            raise StoppedError("the client has gone")
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _events(call: _Call, *, usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events; whatever ends the iteration, also a closed connection, frees the slots."""
    try:
        if call.told.chat:
            yield _event(call.told.opening())
        async for index, piece, chosen in call.pieces():
            yield _event(call.told.chunk(index, piece, call.texts[index].finish, call.logprobs(chosen)))
        if usage:
            yield _event(call.told.used(call.usage))
        yield "data: [DONE]\n\n"
    except LoratuneError as error:
        yield _event(error_of(str(error), "server_error"))
    finally:
        call.end()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
