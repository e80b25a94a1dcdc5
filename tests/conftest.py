"""What every test runs under: no network, few threads, no accelerator tests where there is none."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def _prepare_environment() -> None:
    """Runs before anything imports torch, transformers or matplotlib: they read these once."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["MPLBACKEND"] = "Agg"
    # Workers that each take all cores are slower than one worker.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))
    if not IS_WORKER:  # workers inherit the folder
        cache = tempfile.mkdtemp(prefix="loratune-tests-datasets-")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
        os.environ["HF_DATASETS_CACHE"] = cache


_prepare_environment()

import datetime as dt  # noqa: E402
import importlib.metadata  # noqa: E402
import platform  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests import counts  # noqa: E402

LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost", ""}
REPORTED_VERSIONS = ("torch", "transformers", "accelerate", "datasets", "peft", "pytest")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A test that reaches for another machine fails, whatever the machine it runs on could reach."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def refuse_remote(sock: socket.socket, address: Any) -> None:
        is_internet = sock.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple)
        if is_internet and address[0] not in LOCAL_HOSTS:
            raise RuntimeError(f"a test tried to reach {address[0]}: tests need no network")

    def guarded_connect(sock: socket.socket, address: Any) -> None:
        refuse_remote(sock, address)
        connect(sock, address)

    def guarded_connect_ex(sock: socket.socket, address: Any) -> int:
        refuse_remote(sock, address)
        return connect_ex(sock, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        yield


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`counted("moment of a kill")`: one more for this row of `docs/reliability.md`, if the test passes."""

    def count(what: str, number: int = 1) -> None:
        record_property(counts.PROPERTY, (counts.named(what), number))

    return count


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-result", metavar="FILE", help="write date, versions and counts of this run to FILE")
    parser.addoption("--write-counts", metavar="PAGE", help="write what the tests counted into PAGE, between its marks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return  # importing torch to count devices costs seconds
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    if IS_WORKER:
        return
    if path := config.getoption("--write-result"):
        write_result(Path(config.rootpath, path), terminalreporter.stats, exitstatus, config)
    if path := config.getoption("--write-counts"):
        write_counts(Path(config.rootpath, path), terminalreporter.stats.get("passed", []), exitstatus)


def write_counts(page: Path, passed: list[pytest.TestReport], exitstatus: int) -> None:
    found = counts.totals(item for report in passed for item in report.user_properties)
    result = "passed" if exitstatus == 0 else f"FAILED (exit status {int(exitstatus)})"
    now = dt.datetime.now(dt.UTC)
    head = f"Counted by {len(passed)} tests on {now:%Y-%m-%d}: {result}."
    page.write_text(counts.with_counts(page.read_text(encoding="utf-8"), found, head), encoding="utf-8")


def write_result(target: Path, stats: dict[str, list[Any]], exitstatus: int, config: pytest.Config) -> None:
    outcomes = ("passed", "failed", "error", "skipped", "xfailed")
    counts = {name: len(stats.get(name, ())) for name in outcomes}
    now = dt.datetime.now(dt.UTC)
    seconds = now.timestamp() - config_started(config)
    lines = [
        "The last run of `make test-full`; written by the run itself.",
        "",
        f"date      {now:%Y-%m-%d %H:%M} UTC",
        f"result    {'passed' if exitstatus == 0 else f'FAILED (exit status {int(exitstatus)})'}",
        "counts    " + " · ".join(f"{count} {name}" for name, count in counts.items()),
        f"duration  {seconds / 60:.1f} min, {os.cpu_count()} cores",
        f"system    Python {platform.python_version()}, {sys.platform} {platform.machine()}",
        "versions  " + " · ".join(f"{name} {importlib.metadata.version(name)}" for name in REPORTED_VERSIONS),
    ]
    lines += ["", "not passed:"] if counts["failed"] + counts["error"] + counts["skipped"] else []
    for outcome in ("failed", "error", "skipped"):
        lines += sorted(f"  {outcome:8}{report.nodeid}" for report in stats.get(outcome, ()))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


STARTED = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = dt.datetime.now(dt.UTC).timestamp()


def config_started(config: pytest.Config) -> float:
    return config.stash[STARTED]
