"""From a request for text to its answer, whole or as it comes."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from loratune.engine import Chosen, Sampling
from loratune.engine import Request as Asked
from loratune.engine.text import Text
from loratune.errors import DataError, LoratuneError
from loratune.serve.service import Service
from loratune.serve.wire import ChatBody, TextBody, Told, error_of, usage_of
from loratune.serve.worker import Answers, FailedError, StoppedError

_log = logging.getLogger("loratune.serve")
_Said = tuple[int, str, Any]


@dataclass
class _Call:
    """One request for text: its prompts, and what was said to them so far."""

    service: Service
    told: Told
    answers: Answers
    prompt_tokens: int
    texts: list[Text]
    with_logprobs: bool
    begun: float = field(default_factory=time.perf_counter)
    ended: bool = False

    async def pieces(self) -> AsyncIterator[_Said]:
        """Prompt by number, new text and its probabilities, until all have ended; raises what went wrong."""
        while any(text.finish is None for text in self.texts):
            heard = await self.answers.next()
            if isinstance(heard.what, LoratuneError):
                raise heard.what
            text = self.texts[heard.index]
            if text.finish is not None:
                continue  # its stop sequence has ended it already
            if heard.what.finish == "broken":
                raise FailedError("the model gave no numbers (NaN)", hint="another adapter, or --dtype fp32")
            if not text.tokens:
                self.service.metrics.first_token(self.begun)
            piece = text.add(heard.what)
            if piece or text.finish is not None:
                yield heard.index, piece, self._logprobs(text.told())

    def _logprobs(self, told: Sequence[tuple[int, Chosen]]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        words = self.service.words
        return words.of_chat(told) if self.told.chat else words.of_text(told)

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(self.prompt_tokens, sum(text.tokens for text in self.texts))

    def end(self) -> None:
        """Whatever the reason, its slots are free and it is counted, once."""
        if not self.ended:
            self.ended = True
            self.service.worker.forget(self.answers)
            self.service.metrics.ended(self.prompt_tokens, self.usage["completion_tokens"])


def refuse_many(service: Service, count: int) -> None:
    """Raise DataError for what could not be answered at once however long it waited."""
    if not count:
        raise DataError("prompt: it is empty", hint="give at least one")
    if count > service.worker.most:
        raise DataError(
            f"prompt: {count:,} prompts, and all slots and the queue have room for {service.worker.most:,}",
            hint="ask in several requests",
        )


async def answered(
    service: Service,
    request: Request,
    body: ChatBody | TextBody,
    prompts: Sequence[tuple[int, ...]],
    most: int | None,
    alternatives: int | None,
) -> Response:
    """The answer to each prompt, as the body asks for it."""
    begun = time.perf_counter()
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    stops = frozenset[int]() if body.ignore_eos else service.stop_ids
    limit = service.worker.engine.longest if most is None else most

    def requests(adapter: str | None) -> list[Asked]:
        return [
            Asked(
                prompt,
                stops,
                Sampling(limit, body.temperature, body.top_p, (seed + number) % 2**63),
                adapter,
                alternatives,
            )
            for number, prompt in enumerate(prompts)
        ]

    answers = await service.worker.ask(body.model, requests)
    chat = isinstance(body, ChatBody)
    texts = [Text(service.tokenizer, body.stop or (), () if chat else prompt) for prompt in prompts]
    told = Told(body.model, secrets.token_hex(12), chat=chat)
    call = _Call(service, told, answers, sum(map(len, prompts)), texts, alternatives is not None, begun)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return _Streamed(call, usage=usage)
    return await _whole(call, request)


async def _whole(call: _Call, request: Request) -> JSONResponse:
    logprobs: list[list[Any]] = [[] for _ in call.texts]

    async def collect() -> None:
        async for index, _, some in call.pieces():
            logprobs[index].append(some)

    try:
        await _while_connected(request, collect())
    finally:
        call.end()
    ended = [(text.written, text.finish, _joined(some)) for text, some in zip(call.texts, logprobs, strict=True)]
    return JSONResponse(call.told.whole(ended, call.usage))


def _joined(parts: Sequence[Any]) -> dict[str, Any] | None:
    """The probabilities of an answer from those of its pieces: lists, one after the other."""
    if parts[0] is None:
        return None
    return {
        name: None if first is None else [one for part in parts for one in part[name]]
        for name, first in parts[0].items()
    }


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


class _Streamed(StreamingResponse):
    """The answer as server-sent events."""

    def __init__(self, call: _Call, *, usage: bool) -> None:
        super().__init__(_events(call, usage=usage), media_type="text/event-stream")
        self._call = call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the events: who leaves before the first one never begins them
            self._call.end()


async def _events(call: _Call, *, usage: bool) -> AsyncIterator[str]:
    try:
        if call.told.chat:
            yield _event(call.told.opening())
        async for index, piece, logprobs in call.pieces():
            yield _event(call.told.chunk(index, piece, call.texts[index].finish, logprobs))
        if usage:
            yield _event(call.told.used(call.usage))
        yield "data: [DONE]\n\n"
    except LoratuneError as error:
        yield _event(error_of(str(error), "server_error"))
    except Exception as error:  # noqa: BLE001 - the status is sent: what remains to be told is told here
        _log.exception("an answer failed")
        yield _event(error_of(f"the server failed ({type(error).__name__})", "server_error"))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
