"""From names to a running server."""

from __future__ import annotations

import ipaddress
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from loratune.engine import Engine, Limits
from loratune.errors import ConfigError, LoratuneError
from loratune.model import Base, load_base, stop_ids, why_not_packed
from loratune.serve.app import Service, make_app
from loratune.serve.library import Library
from loratune.serve.worker import Worker

Say = Callable[[str], None]


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
        if self.api_key is not None and not self.api_key.strip():
            problems.append("api_key: it is empty")
        if self.adapter_dir is not None and not Path(self.adapter_dir).expanduser().is_dir():
            problems.append(f"adapter_dir={self.adapter_dir!r}: no such folder")
        if problems:
            raise ConfigError(problems, hint="loratune serve --help says what can be set")

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
        ConfigError: the model cannot be batched, or adapters that do not fit or clash, all of them at once.
    """
    config = config or ServeConfig()
    base = load_base(model, **loading)
    service = service_of(base, runs, config)
    names = ", ".join(service.library.folders) or "no adapters"
    say(f"{service.library.base} with {names} on http://{config.host}:{config.port}")
    if config.public and config.api_key is None:
        say("others on the network can reach it, and no --api-key is asked of them")
    settings = uvicorn.Config(
        make_app(service),
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(config.grace),
    )
    _Server(settings).run()


class _Server(uvicorn.Server):
    """One that ends in order, and by itself: being told to end is no failure of the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def service_of(base: Base, runs: Sequence[str], config: ServeConfig) -> Service:
    """Everything that the routes need, with the adapters loaded."""
    why_not = why_not_packed(base.model)
    if why_not is not None:
        raise ConfigError(f"{base.name} cannot answer several requests at once: {why_not}", hint="see loratune chat")
    engine = Engine(base.model, limits=Limits(config.slots, longest=config.longest))
    library = Library(engine, base.tokenizer, _called(base.name), config.adapters)
    _add_all(library, runs)
    return Service(
        Worker(engine, library, config.queue),
        base.tokenizer,
        stop_ids(base.model, base.tokenizer),
        None if config.adapter_dir is None else Path(config.adapter_dir).expanduser(),
        config.api_key,
        grace=config.grace,
    )


def _called(name: str) -> str:
    """A hub id as it is; of a folder or file its own name."""
    path = Path(name).expanduser()
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else name


def _add_all(library: Library, runs: Sequence[str]) -> None:
    problems, hint = [], ""
    for run in runs:
        name, _, path = run.rpartition("=") if "=" in run and not Path(run).exists() else ("", "", run)
        name = name or Path(path).expanduser().resolve().name.replace(".", "-")
        try:
            library.add(name, path)
        except LoratuneError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
            hint = error.hint
    if problems:
        raise ConfigError(problems, hint=hint)
