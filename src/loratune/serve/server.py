"""From names to a running server."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from loratune.engine import Engine, Limits, make_ready
from loratune.errors import ConfigError, LoratuneError
from loratune.model import Base, load_base, stop_ids
from loratune.serve.app import make_app
from loratune.serve.library import Library
from loratune.serve.reserve import adapters_bytes
from loratune.serve.service import Service
from loratune.serve.worker import Worker

Say = Callable[[str], None]
# Connections beside those that are answered or wait: those that are kept open, and who is told to come again. Beyond
# them uvicorn itself refuses, in plain text.
_OTHERS = 64


# Seconds beyond the grace in which answers that were ended are sent.
_LAST_WORDS = 5


@dataclass(frozen=True)
class ServeConfig:
    """How a server is run.

    Attributes:
        slots: requests that are answered at once. queue: those that may wait beside them.
        adapters: on the model at once; others that are known are loaded when they are asked for.
        adapter_dir: the folder from which requests may load adapters; none may without it.
        longest: tokens of a row, prompt and answer; the model's context where it is None.
        grace: seconds that answers have to end when the server is told to.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    slots: int = 32
    queue: int = 256
    adapters: int = 16
    adapter_dir: str | None = None
    longest: int | None = None
    grace: float = 30.0

    def __post_init__(self) -> None:
        counts = {"slots": self.slots, "adapters": self.adapters}
        problems = [f"{name}={value}: at least 1" for name, value in counts.items() if value < 1]
        if not 0 <= self.port < 65536:
            problems.append(f"port={self.port}: 0 to 65535")
        if self.queue < 0:
            problems.append(f"queue={self.queue}: at least 0")
        if self.longest is not None and self.longest < 2:
            problems.append(f"longest={self.longest}: at least 2")
        if self.api_key is not None and (not self.api_key or self.api_key != self.api_key.strip()):
            problems.append("api_key: it is empty, or has blanks around it, which no caller can show")
        if not 0 <= self.grace < math.inf:
            problems.append(f"grace={self.grace}: seconds")
        if self.adapter_dir is not None and not Path(self.adapter_dir).expanduser().is_dir():
            problems.append(f"adapter_dir={self.adapter_dir!r}: no such folder")
        if problems:
            raise ConfigError(problems, hint="loratune serve --help says what can be set")

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """The names by which it is called where only this machine can reach it; None for any."""
        return None if self.public else ("localhost", "127.0.0.1", "::1", self.host)

    @property
    def public(self) -> bool:
        """Whether others than this machine can reach it."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"


def serve(
    model: str,
    runs: Sequence[str] = (),
    config: ServeConfig | None = None,
    *,
    say: Say = lambda _: None,
    **loading: Any,
) -> None:
    """Serve a base and adapters on it until the process is told to end.

    Args:
        runs: run or adapter folders or hub ids, each with a name before it if it likes: `NAME=FOLDER`.
        loading: `dtype`, `device` and `quant`, as `load_base` has them.

    Raises:
        ConfigError: the address is taken; the model cannot be batched; adapters that do not fit or clash, all of them
            at once.
    """
    config = config or ServeConfig()
    with _bound(config.host, config.port) as listening:  # before the model, which takes its time
        service = _elsewhere(lambda: service_of(load_base(model, **loading), runs, config))
        settings = uvicorn.Config(
            make_app(service),
            log_level="warning",
            access_log=False,
            # The worker itself ends answers that take longer than the grace, each with a word.
            timeout_graceful_shutdown=math.ceil(config.grace) + _LAST_WORDS,
            limit_concurrency=service.worker.most + _OTHERS,
        )
        server = Server(settings, lambda: _announce(service, config, listening.getsockname()[1], say), service)
        try:
            server.run([listening])
        finally:  # told twice, it leaves its own end out; a thread inside the model must not outlive the process
            service.worker.stop(0)


def _elsewhere(act: Callable[[], Service]) -> Service:
    """What `act` gives or raises, on a thread that ends with it.

    OpenMP keeps a team for every thread that has computed something. Beside one of the main thread's, the worker's own
    would be more than there are cores: it then sleeps between any two operations, and waking it takes longer than they
    do (half as many tokens a second again without, on two cores).
    """
    future: Future[Service] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            future.set_exception(error)

    threading.Thread(target=run, name="loratune-loading", daemon=True).start()
    return future.result()


def _bound(host: str, port: int) -> socket.socket:
    """A socket of this address, on which nobody listens yet."""
    found = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, UnicodeError) as error:
        if found is not None:
            found.close()
        raise ConfigError(
            f"nothing can listen on {host}:{port}: {error}", hint="choose another --port; 0 takes a free one"
        ) from None
    return found


def _announce(service: Service, config: ServeConfig, port: int, say: Say) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    names = ", ".join(service.library.folders) or "no adapters"
    say(f"{service.library.base} with {names} on http://{host}:{port}")
    if config.public and config.api_key is None:
        say("others on the network can reach it, and no --api-key is asked of them")


class Server(uvicorn.Server):
    """One that says when it can be asked, and ends in order: being told to end is no failure of the process."""

    def __init__(self, settings: uvicorn.Config, ready: Callable[[], None], service: Service) -> None:
        super().__init__(settings)
        self._ready, self._service = ready, service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn waits for answers before it ends the application, which would never tell them that time is up."""
        ending = asyncio.create_task(asyncio.to_thread(self._service.worker.stop, self._service.grace))
        await super().shutdown(sockets)
        if self.force_exit:  # it was told twice, and uvicorn leaves the application's own end out
            await asyncio.to_thread(self._service.worker.stop, 0)
            await self.lifespan.shutdown()
        await ending

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def service_of(base: Base, runs: Sequence[str], config: ServeConfig) -> Service:
    """Everything that the routes need, with the adapters loaded."""
    why_not = make_ready(base.model)
    if why_not is not None:
        raise ConfigError(f"{base.name} cannot answer several requests at once: {why_not}", hint="see loratune chat")
    if getattr(base.tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"{base.name} has a tokenizer of Python only, which is too slow to serve",
            hint="save it with a tokenizer.json (AutoTokenizer.from_pretrained(..., use_fast=True))",
        )
    named = [_named(run) for run in runs]
    count = config.adapters if config.adapter_dir is not None else min(config.adapters, len(named))
    reserved = adapters_bytes(base.model, base.model.dtype, [path for _, path in named], count)
    engine = Engine(base.model, limits=Limits(config.slots, longest=config.longest, reserved=reserved))
    library = Library(engine, base.tokenizer, _called(base.name), config.adapters)
    _add_all(library, named)
    return Service(
        Worker(engine, library, config.queue),
        base.tokenizer,
        stop_ids(base.model, base.tokenizer),
        None if config.adapter_dir is None else Path(config.adapter_dir).expanduser(),
        config.api_key,
        config.hosts,
        grace=config.grace,
    )


def _called(name: str) -> str:
    """A hub id as it is; of a folder or file its own name."""
    path = Path(name).expanduser()
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else name


def _named(run: str) -> tuple[str, str]:
    """Name and path of a run: `NAME=FOLDER`, or the folder's own name, in which a dot would look like a file's."""
    name, _, path = run.partition("=") if "=" in run and not Path(run).exists() else ("", "", run)
    return name or Path(path).expanduser().resolve().name.replace(".", "-"), path


def _add_all(library: Library, named: Sequence[tuple[str, str]]) -> None:
    problems, hint = [], ""
    for name, path in named:
        try:
            library.add(name, path)
        except LoratuneError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
            hint = error.hint
    if problems:
        raise ConfigError(problems, hint=hint)
