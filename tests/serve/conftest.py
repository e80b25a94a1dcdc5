"""A real server in a process of its own, with three adapters on a tiny model, and the clients that talk to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import loratune as lt
from loratune.model import load_base
from loratune.serve.app import make_app
from loratune.serve.server import ServeConfig, service_of
from tests.models import saved, tiny

NAMES = ("a", "b", "c")


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)


@dataclass
class Shelf:
    """Folders on disk: a base, and adapters of it."""

    base: Path
    adapters: Path


Start = Callable[..., Server]

# The command with a pause before each step, so that an answer is certainly under way when something happens to it.
SLOW = """
import sys, time
from loratune.engine import Engine
step, pause = Engine.step, float(sys.argv.pop(1))
Engine.step = lambda engine: time.sleep(pause) or step(engine)
from loratune.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("shelf")
    base = saved(folder / "tiny-llama", "llama")
    for number, name in enumerate((*NAMES, "late", "dora", "stranger")):
        model: Any = tiny("llama", seed=5 if name == "stranger" else 0)
        torch.manual_seed(number)
        config = lt.LoraConfig(r=2 + number, target_modules="all-linear", use_dora=name == "dora")
        lora = lt.attach(model, config)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        lora.save(folder / "adapters" / name)
    return Shelf(base, folder / "adapters")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def start(shelf: Shelf) -> Iterator[Start]:
    """Starts servers by the command; they end with the tests."""
    running: list[subprocess.Popen[str]] = []

    def run(
        *options: str, names: tuple[str, ...] = NAMES, environment: dict[str, str] | None = None, pause: float = 0
    ) -> Server:
        port = free_port()
        runs = [str(shelf.adapters / name) for name in names]
        program = ["-c", SLOW, str(pause)] if pause else ["-m", "loratune"]
        command = [sys.executable, *program, "serve", str(shelf.base), *runs, "--port", str(port), *options]
        told = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | (environment or {})
        process = subprocess.Popen(
            [*command, "--dtype", "fp32"], env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None:
                raise AssertionError(process.communicate()[1])
            try:
                if httpx.get(f"{url}/health", timeout=1).status_code == 200:
                    return Server(url, process)
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("the server did not come up")

    yield run
    for process in running:
        process.terminate()
    for process in running:
        process.wait(30)


@pytest.fixture(scope="session")
def server(start: Start, shelf: Shelf) -> Server:
    return start("--adapter-dir", str(shelf.adapters), "--slots", "4", "--max-adapters", "3")


@pytest.fixture(scope="session")
def slow(start: Start) -> Server:
    """100 tokens take half a minute here."""
    return start("--slots", "4", names=("a",), pause=0.3)


def service(shelf: Shelf, *names: str, **config: Any) -> Any:
    """What a server stands on, in this process."""
    runs = [str(shelf.adapters / name) for name in names]
    return service_of(load_base(str(shelf.base), dtype="fp32"), runs, ServeConfig(**config))


@contextmanager
def asked_here(service: Any, app: Any = None) -> Iterator[httpx.Client]:
    """A client of the application without a socket; what the server fails at is its answer, not raised here."""
    with TestClient(app or make_app(service), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def spelled(vocabulary: dict[str, int], *, sentencepiece: bool = False) -> Any:
    """A tokenizer of these tokens, whose text is how they are spelled; or as SentencePiece's are, with bytes."""
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=sentencepiece))
    steps: list[Any] = [decoders.Fuse()]
    if sentencepiece:
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
