"""The thread that continues rows: whatever happens to it, nobody waits for ever and no slot is lost."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from loratune.engine import Request, Sampling
from loratune.errors import LoratuneError
from loratune.serve.worker import FailedError, Worker
from tests.serve.conftest import Shelf, asked_here, service

ASKED = {"model": "a", "prompt": "x", "max_tokens": 20, "temperature": 0, "ignore_eos": True}


class Held:
    """Steps of an engine that wait until they are let go, and then do what they are told."""

    def __init__(self, engine: Any) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.then: Callable[[], None] = lambda: None
        self._step = engine.step
        engine.step = self.step

    def step(self) -> Any:
        self.begun.set()
        assert self.go_on.wait(30)
        self.then()
        return self._step()


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.fixture
def found(shelf: Shelf) -> Any:
    return service(shelf, "a", "b", slots=1, queue=4, adapters=1)


@pytest.fixture
def held(found: Any) -> Iterator[Held]:
    held = Held(found.worker.engine)
    yield held
    held.go_on.set()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# -- a step that fails -------------------------------------------------------------------------------------------------


def test_a_step_that_fails_is_told_to_all_and_the_server_goes_on(found: Any, held: Held) -> None:
    held.then = fail(RuntimeError("no such kernel"))
    with asked_here(found) as client, ThreadPoolExecutor(3) as pool:
        before = pool.submit(client.post, "/v1/completions", json=ASKED)
        assert held.begun.wait(20)
        streamed = pool.submit(client.post, "/v1/completions", json={**ASKED, "stream": True})
        until(lambda: len(found.worker._ears) + found.worker._jobs.qsize() == 2)
        held.go_on.set()
        one, other = before.result(20), streamed.result(20)
        assert one.status_code == 500
        assert "retry-after" not in one.headers
        assert one.json()["error"]["type"] == "server_error"
        assert "no such kernel" in one.json()["error"]["message"]
        assert other.status_code in (200, 500)  # its first step may have been this one, or the next
        held.then = lambda: None
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/v1/completions", json=ASKED).status_code == 200
        assert "loratune_failed 0" not in client.get("/metrics").text
    assert not found.worker.engine.busy


def test_a_step_that_fails_leaves_those_who_wait(found: Any) -> None:
    """They were in no step yet; nobody else's prompt may cost them their answer."""
    worker, told = found.worker, list[tuple[str, Any]]()
    engine = worker.engine
    engine.limits = replace(engine.limits, slots=1)
    tickets = [engine.submit(Request((5, 6, 7), frozenset(), Sampling(max_new_tokens=3))) for _ in "ab"]
    for name, ticket in zip("ab", tickets, strict=True):
        ear = SimpleNamespace(tell=lambda _, what, name=name: told.append((name, what)))
        worker._ears[ticket] = 0, ear
    step, engine.step = engine.step, fail(RuntimeError("no such kernel"))
    worker._step()
    assert [(name, type(what)) for name, what in told] == [("a", FailedError)]
    assert list(worker._ears) == tickets[1:]
    engine.step = step
    while engine.busy:
        worker._step()
    assert [name for name, _ in told] == ["a", "b", "b", "b"]


def test_no_numbers_are_a_failure_of_the_server(found: Any) -> None:
    from loratune.engine import Chosen

    step = found.worker.engine.step

    def broken() -> Any:
        return [Chosen(one.ticket, one.token, "broken") for one in step()]

    found.worker.engine.step = broken
    with asked_here(found) as client:
        answer = client.post("/v1/completions", json={**ASKED, "max_tokens": 1})
    assert answer.status_code == 500
    assert "retry-after" not in answer.headers
    assert "NaN" in answer.json()["error"]["message"]


# -- a thread that ends ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_is_told_to_all(found: Any, held: Held) -> None:
    held.then = fail(SystemExit("the driver is gone"))
    with asked_here(found) as client, ThreadPoolExecutor(4) as pool:
        whole = pool.submit(client.post, "/v1/completions", json=ASKED)
        assert held.begun.wait(20)
        waiting = pool.submit(client.post, "/v1/completions", json={**ASKED, "stream": True})
        until(lambda: found.worker._jobs.qsize() > 0)  # handed over, and never looked at
        held.go_on.set()
        for answer in (whole.result(10), waiting.result(10)):
            assert answer.status_code == 500
            assert "SystemExit" in answer.json()["error"]["message"]
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        for path, body in (("completions", ASKED), ("unload_lora_adapter", {"lora_name": "b"})):
            assert client.post(f"/v1/{path}", json=body).status_code == 500


def test_nothing_is_handed_to_a_thread_that_has_ended(found: Any) -> None:
    """The thread ends between the look at it and the job."""
    worker: Worker = found.worker

    class Late(type(worker)):  # type: ignore[misc]
        alive = property(lambda _: True)

    async def ask() -> None:
        worker.start()
        worker.stop(5)
        worker.__class__ = Late
        with pytest.raises(LoratuneError, match="is ending"):
            await asyncio.wait_for(worker.do(lambda: 1), 5)

    asyncio.run(ask())


# -- who goes before it begins -----------------------------------------------------------------------------------------


def test_who_goes_while_the_request_is_handed_over_leaves_nothing(found: Any) -> None:
    worker: Worker = found.worker
    inside, go_on = threading.Event(), threading.Event()
    submit = worker.engine.submit

    def slowly(request: Any) -> int:
        inside.set()
        assert go_on.wait(20)
        return submit(request)

    worker.engine.submit = slowly  # type: ignore[method-assign]

    async def ask() -> None:
        from loratune.engine import Request, Sampling

        asked = Request((5, 6), frozenset(), Sampling(100_000))
        task = asyncio.ensure_future(worker.ask(found.library.base, lambda _: [asked]))
        await asyncio.to_thread(inside.wait, 20)
        worker.engine.step = lambda: time.sleep(0.01) or []  # type: ignore[method-assign, return-value, func-returns-value]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go_on.set()
        await asyncio.to_thread(until, lambda: not worker.engine.busy and not worker._jobs.qsize())
        assert not worker._ears

    worker.start()
    try:
        asyncio.run(ask())
    finally:
        worker.stop(0)


def test_a_stream_that_nobody_begins_to_read_frees_its_slot(found: Any, held: Held) -> None:
    from loratune.serve.app import make_app

    async def ask() -> None:
        app = make_app(found)
        body = json.dumps({**ASKED, "stream": True}).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(_: Any) -> None:
            raise OSError("the connection is closed")

        await asyncio.gather(app(scope, receive, send), return_exceptions=True)
        held.go_on.set()
        held.then = lambda: time.sleep(0.1)
        await asyncio.to_thread(until, lambda: not found.worker.engine.busy)

    found.worker.start()
    try:
        asyncio.run(ask())
        assert "loratune_generated_tokens_total 0.0" in found.metrics.text(found.worker).decode()
        assert "loratune_requests_total 1.0" in found.metrics.text(found.worker).decode()
    finally:
        found.worker.stop(1)


# -- room --------------------------------------------------------------------------------------------------------------


def test_who_finds_no_room_moves_no_adapter(shelf: Shelf) -> None:
    found = service(shelf, "a", "b", "c", slots=1, queue=1, adapters=2)
    held = Held(found.worker.engine)
    assert found.library.loaded == ("b", "c")
    with asked_here(found) as client, ThreadPoolExecutor(2) as pool:
        body = {**ASKED, "model": "b"}
        running = pool.submit(client.post, "/v1/completions", json=body)
        assert held.begun.wait(20)
        waiting = pool.submit(client.post, "/v1/completions", json=body)
        until(lambda: found.worker._jobs.qsize() > 0)
        late: list[httpx.Response] = []
        refused = ThreadPoolExecutor(1).submit(lambda: late.append(client.post("/v1/completions", json=ASKED)))
        until(lambda: found.worker._jobs.qsize() > 1)
        held.go_on.set()
        refused.result(20)
        assert late[0].status_code == 429
        assert found.library.loaded == ("c", "b")
        assert {one.result(20).status_code for one in (running, waiting)} == {200}
