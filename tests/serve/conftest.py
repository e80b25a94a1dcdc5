"""A real server in a process of its own, with three adapters on a tiny model, and the clients that talk to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

import loratune as lt
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

    def run(*options: str, names: tuple[str, ...] = NAMES, environment: dict[str, str] | None = None) -> Server:
        port = free_port()
        runs = [str(shelf.adapters / name) for name in names]
        command = [sys.executable, "-m", "loratune", "serve", str(shelf.base), *runs, "--port", str(port), *options]
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
