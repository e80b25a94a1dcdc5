"""From names to a running server: where it listens, when it says so, and how it ends."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest
import uvicorn

import loratune.serve.server as server_module
from loratune.engine import Engine
from loratune.errors import ConfigError, ModelError
from loratune.model import load_base
from loratune.serve import ServeConfig, serve
from loratune.serve.server import service_of
from tests.serve.conftest import Shelf

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)$")


def test_what_it_says_is_where_it_can_be_asked(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread that is not the first; on a free port, which is told once it is open."""
    said: list[tuple[str, int]] = []
    running: list[Any] = []

    startup = uvicorn.Server.startup

    async def known(self: uvicorn.Server, *args: Any, **kwargs: Any) -> None:
        running.append(self)
        await startup(self, *args, **kwargs)

    monkeypatch.setattr(uvicorn.Server, "startup", known)

    def say(text: str) -> None:
        port = ADDRESS.search(text)
        assert port, text
        with socket.create_connection(("127.0.0.1", int(port[1])), 5):
            said.append((text, int(port[1])))

    config = ServeConfig(port=0, grace=1)
    thread = threading.Thread(target=lambda: serve(str(shelf.base), (), config, say=say, dtype="fp32"), daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not said and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.02)
    assert said, "it said where it can be asked"
    assert said[0][1] != 0
    assert httpx.get(f"http://127.0.0.1:{said[0][1]}/health").json() == {"status": "ok"}
    running[0].should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_nothing_is_computed_on_a_thread_that_stays(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP's team of such a thread would stand beside the worker's: two for the same cores."""
    loading: list[threading.Thread] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        loading.append(threading.current_thread())
        return load_base(*args, **kwargs)

    serving: list[Any] = []
    monkeypatch.setattr(server_module, "load_base", noted)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: serving.append(loading[0].is_alive()))
    serve(str(shelf.base), (), ServeConfig(port=0), dtype="fp32")
    assert loading[0] is not threading.main_thread()
    assert serving == [False]


def test_what_fails_while_loading_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ModelError("no such model")

    monkeypatch.setattr(server_module, "load_base", fails)
    with pytest.raises(ModelError, match="no such model"):
        serve("nobody/nothing", (), ServeConfig(port=0))


def test_answers_that_outlast_the_grace_are_told_so(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[Any] = []
    said: list[str] = []
    startup, step = uvicorn.Server.startup, Engine.step

    async def known(self: uvicorn.Server, *args: Any, **kwargs: Any) -> None:
        running.append(self)
        await startup(self, *args, **kwargs)

    monkeypatch.setattr(uvicorn.Server, "startup", known)
    monkeypatch.setattr(Engine, "step", lambda engine: time.sleep(0.2) or step(engine))
    config = ServeConfig(port=0, grace=1)
    thread = threading.Thread(
        target=lambda: serve(str(shelf.base), (), config, say=said.append, dtype="fp32"), daemon=True
    )
    thread.start()
    end = time.monotonic() + 30
    while not said and time.monotonic() < end:
        time.sleep(0.02)
    port = ADDRESS.search(said[0])
    assert port
    asked = {"model": shelf.base.name, "prompt": "x", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"http://127.0.0.1:{port[1]}/v1/completions", json=asked, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        running[0].should_exit = True
        told = [line for line in lines if line]
    assert "the server is ending" in told[-1]
    thread.join(20)
    assert not thread.is_alive()


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"nothing can listen on 127.0.0.1:{port}") as caught:
            serve("nowhere", (), ServeConfig(port=port))
    assert "--port" in str(caught.value)
    with pytest.raises(ConfigError, match="nothing can listen on nowhere"):
        serve("nowhere", (), ServeConfig(host="nowhere.invalid"))


def test_a_taken_port_is_said_in_words(shelf: Shelf) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "loratune", "serve", str(shelf.base), "--port", port]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == ConfigError.exit_code
    assert "nothing can listen" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_tokenizer_of_python_only_is_refused(shelf: Shelf) -> None:
    base = load_base(str(shelf.base), dtype="fp32")

    class Slow:
        chat_template = None
        eos_token_id = 1

        def __len__(self) -> int:
            return 400

    object.__setattr__(base, "tokenizer", Slow())
    with pytest.raises(ConfigError, match="tokenizer of Python only") as caught:
        service_of(base, [], ServeConfig())
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize(
    ("host", "names"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_names_are_asked_for_where_only_this_machine_can_come(host: str, names: bool) -> None:
    assert (ServeConfig(host=host).hosts is not None) == names


def test_connections_have_an_end(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, *_, **__: seen.append(self.config))
    serve(str(shelf.base), (), ServeConfig(port=0, slots=3, queue=5), dtype="fp32")
    assert seen[0].limit_concurrency is not None
    assert 8 < seen[0].limit_concurrency < 200
