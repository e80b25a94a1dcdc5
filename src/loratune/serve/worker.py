"""The thread that continues rows. Others talk to it by jobs, which it does between two steps, and hear by queues."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from loratune.engine import Chosen, Engine, Request
from loratune.errors import LoratuneError
from loratune.serve.library import Library

T = TypeVar("T")
_log = logging.getLogger("loratune.serve")


class BusyError(LoratuneError):
    """As many requests wait as may."""


class StoppedError(LoratuneError):
    """The server is ending, or its model failed."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What happened to one of a call's prompts: a token, or a failure."""

    index: int
    what: Chosen | LoratuneError


class Answers:
    """The tokens of one or more prompts as they come, on the event loop of who asked."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[Heard] = asyncio.Queue()
        self.tickets: list[int] = []

    def tell(self, index: int, what: Chosen | LoratuneError) -> None:
        """From the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._heard.put_nowait, Heard(index, what))
        except RuntimeError:  # the loop is closed: nobody listens any more
            _log.debug("an answer came after its event loop had ended")

    async def next(self) -> Heard:
        return await self._heard.get()


class Worker:
    """Runs an engine.

    Attributes:
        room: how many requests may wait for a slot.
    """

    def __init__(self, engine: Engine, library: Library, room: int) -> None:
        self.engine, self.library, self.room = engine, library, room
        self.failed = 0
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ears: dict[int, tuple[int, Answers]] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="loratune-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def stop(self, grace: float) -> None:
        """Take nothing more; what is being answered has so many seconds to end."""
        self._stopping = True
        self._jobs.put(lambda: None)
        self._thread.join(grace)
        if self._thread.is_alive():
            self._jobs.put(self._give_up)
            self._thread.join(30)

    async def do(self, job: Callable[[], T]) -> T:
        """What `job` returns or raises; it is done on the worker's thread, between two steps."""
        if not self.alive:
            raise StoppedError("the server is ending", hint="ask another one")
        future: Future[T] = Future()

        def act() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # noqa: BLE001 - who asked is told, whatever it was
                    future.set_exception(error)

        self._jobs.put(act)
        return await asyncio.wrap_future(future)

    async def ask(self, name: str, requests: Callable[[str | None], Sequence[Request]]) -> Answers:
        """Submit the requests for the model `name`.

        Args:
            requests: of the adapter's name.

        Raises:
            BusyError: too many wait already. What `Library.ready` and `Engine.submit` raise.
        """
        answers = Answers()
        await self.do(lambda: self._submit(name, requests, answers))
        return answers

    def forget(self, answers: Answers) -> None:
        """Nobody listens to these any more; their slots are free at the next step."""
        if answers.tickets:
            self._jobs.put(lambda: self._cancel(answers.tickets))

    # -- on the worker's thread --------------------------------------------------------------------------------------

    def _submit(self, name: str, requests: Callable[[str | None], Sequence[Request]], answers: Answers) -> None:
        asked = requests(self.library.ready(name))
        free = self.engine.limits.slots - self.engine.running
        if self.engine.waiting + len(asked) > self.room + free:
            raise BusyError(
                f"{self.engine.running} requests are answered and {self.engine.waiting} wait", hint="ask again later"
            )
        try:
            for index, request in enumerate(asked):
                ticket = self.engine.submit(request)
                answers.tickets.append(ticket)
                self._ears[ticket] = index, answers
        except LoratuneError:
            self._cancel(answers.tickets)
            raise

    def _cancel(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            if self._ears.pop(ticket, None) is not None:
                self.engine.cancel(ticket)

    def _run(self) -> None:
        while True:
            if self._stopping and not self.engine.busy and self._jobs.empty():
                return
            self._do_jobs(wait=not self.engine.busy)
            if self.engine.busy:
                self._step()

    def _do_jobs(self, *, wait: bool) -> None:
        try:
            self._jobs.get(block=wait)()
            while True:
                self._jobs.get_nowait()()
        except queue.Empty:
            return

    def _step(self) -> None:
        try:
            told = self.engine.step()
        except Exception as error:  # noqa: BLE001 - whatever a model raises, those who wait hear of it
            self.failed += 1
            _log.exception("a step failed")
            self._break_off(StoppedError(f"the model failed ({type(error).__name__}): {str(error)[:200]}"))
            return
        for chosen in told:
            index, answers = self._ears[chosen.ticket]
            answers.tell(index, chosen)
            if chosen.finish is not None:
                del self._ears[chosen.ticket]

    def _give_up(self) -> None:
        self._break_off(StoppedError("the server is ending"))

    def _break_off(self, error: LoratuneError) -> None:
        for index, answers in self._ears.values():
            answers.tell(index, error)
        self._cancel(list(self._ears))


def counted(worker: Worker) -> dict[str, Any]:
    """What is going on now."""
    return {
        "running": worker.engine.running,
        "waiting": worker.engine.waiting,
        "adapters": len(worker.library.loaded),
        "failed": worker.failed,
    }
