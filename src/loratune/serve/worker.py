"""The thread that continues rows. Others talk to it by jobs, which it does between two steps, and hear by queues."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loratune.engine import Chosen, Engine, Request
from loratune.errors import LoratuneError
from loratune.model import freed_memory_kept
from loratune.serve.library import Library

T = TypeVar("T")
_log = logging.getLogger("loratune.serve")


class BusyError(LoratuneError):
    """As many requests wait as may."""


class StoppedError(LoratuneError):
    """The server is ending."""


class FailedError(LoratuneError):
    """The model failed."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What is done between two steps, and who waits for it."""

    act: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.act())
            except BaseException as error:  # noqa: BLE001 - who asked is told, whatever it was
                self.future.set_exception(error)

    def refuse(self, error: LoratuneError) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


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
        failed: how many steps failed. fatal: why the thread has ended, where that was a failure.
    """

    def __init__(self, engine: Engine, library: Library, room: int) -> None:
        self.engine, self.library, self.room = engine, library, room
        self.failed = 0
        self.fatal: FailedError | None = None
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._ears: dict[int, tuple[int, Answers]] = {}
        self._stopping = False
        # Held while a job is handed over: none may come after the last one was looked at.
        self._handing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="loratune-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping and not self._closed

    @property
    def most(self) -> int:
        """Prompts that one request may have: more would never find room."""
        return self.engine.limits.slots + self.room

    def stop(self, grace: float) -> None:
        """Take nothing more; what is being answered has so many seconds to end."""
        self._stopping = True
        if self._thread.ident is None:
            return
        self._hand_over(_Job(lambda: None))
        self._thread.join(grace)
        if self._thread.is_alive():
            self._hand_over(_Job(self._give_up))
            self._thread.join(30)

    async def do(self, act: Callable[[], T]) -> T:
        """What `act` returns or raises; it is done on the worker's thread, between two steps.

        Raises:
            StoppedError: the server is ending. FailedError: the thread has ended by a failure.
        """
        job = _Job(act)
        if not self.alive or not self._hand_over(job):
            raise self._why_closed()
        found: T = await asyncio.wrap_future(job.future)
        return found

    async def ask(self, name: str, requests: Callable[[str | None], Sequence[Request]]) -> Answers:
        """Submit the requests for the model `name`.

        Args:
            requests: of the adapter's name.

        Raises:
            BusyError: too many wait already. What `Library.ready` and `Engine.submit` raise.
        """
        answers = Answers()
        try:
            await self.do(lambda: self._submit(name, requests, answers))
        except BaseException:  # who waited may be gone, and the job done all the same
            self.forget(answers)
            raise
        return answers

    def forget(self, answers: Answers) -> None:
        """Nobody listens to these any more; their slots are free at the next step."""
        self._hand_over(_Job(lambda: self._cancel(answers.tickets)))

    def _hand_over(self, job: _Job) -> bool:
        """Whether it will be done."""
        with self._handing:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    def _why_closed(self) -> LoratuneError:
        if self.fatal is not None:
            return FailedError(self.fatal.problems, hint=self.fatal.hint)
        return StoppedError("the server is ending", hint="ask another one")

    # -- on the worker's thread --------------------------------------------------------------------------------------

    def _submit(self, name: str, requests: Callable[[str | None], Sequence[Request]], answers: Answers) -> None:
        self.library.refuse_unknown(name)
        asked = requests(None if name == self.library.base else name)
        free = self.engine.limits.slots - self.engine.running
        if self.engine.waiting + len(asked) > self.room + free:
            raise BusyError(
                f"{self.engine.running} requests are answered and {self.engine.waiting} wait", hint="ask again later"
            )
        self.library.ready(name)  # not before there is room: another adapter may have to make way
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
        try:
            with freed_memory_kept(self.engine.model.device):
                self._work()
        except BaseException as error:  # noqa: BLE001 - whatever it was, those who wait hear of it
            _log.exception("the thread of the model has ended")
            self.fatal = FailedError(f"the model failed ({type(error).__name__})", hint="start the server again")
        finally:
            self._close()

    def _close(self) -> None:
        """Nothing is done after this: who waits is told."""
        with self._handing:
            self._closed = True
        why = self._why_closed()
        for index, answers in self._ears.values():
            answers.tell(index, why)
        while not self._jobs.empty():
            self._jobs.get().refuse(why)

    def _work(self) -> None:
        while True:
            if self._stopping and not self.engine.busy and self._jobs.empty():
                return
            self._do_jobs(wait=not self.engine.busy)
            if self.engine.busy:
                self._step()

    def _do_jobs(self, *, wait: bool) -> None:
        try:
            self._jobs.get(block=wait).run()
            while True:
                self._jobs.get_nowait().run()
        except queue.Empty:
            return

    def _step(self) -> None:
        try:
            told = self.engine.step()
        except Exception as error:  # noqa: BLE001 - whatever a model raises, those who wait hear of it
            self.failed += 1
            _log.exception("a step failed")
            self._break_off(
                FailedError(f"the model failed ({type(error).__name__}): {str(error)[:200]}"), self.engine.next_tickets
            )
            return
        for chosen in told:
            index, answers = self._ears[chosen.ticket]
            answers.tell(index, chosen)
            if chosen.finish is not None:
                del self._ears[chosen.ticket]

    def _give_up(self) -> None:
        self._break_off(StoppedError("the server is ending"), tuple(self._ears))

    def _break_off(self, error: LoratuneError, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            if ticket in self._ears:
                index, answers = self._ears[ticket]
                answers.tell(index, error)
        self._cancel(tickets)


def counted(worker: Worker) -> dict[str, Any]:
    """What is going on now."""
    return {
        "running": worker.engine.running,
        "waiting": worker.engine.waiting,
        "adapters": len(worker.library.loaded),
        "failed": worker.failed,
    }
