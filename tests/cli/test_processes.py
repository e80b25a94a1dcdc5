"""The command as its users start it: a process of its own, signals and closed pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import QUICK

LONG = (*QUICK, "--max-steps=600", "--checks=off", "--samples=0", "--eval-every=300", "--save-every=60")


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR")}
    return subprocess.Popen(
        [sys.executable, "-m", "loratune", *map(str, words)],
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests under `nohup` has it ignored, and so would the process.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509 - no thread runs
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


def steps_done(folder: Path) -> int:
    try:
        return sum('"loss"' in line for line in (folder / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def is_under_way(folder: Path) -> bool:
    return steps_done(folder) >= 30


def has_a_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoints" / "step-00000060").is_dir()


def signalled(
    number: signal.Signals, folder: Path, *words: object, once: Callable[[Path], bool] = is_under_way
) -> tuple[int, str, str]:
    """Start a run and send it a signal once something is so."""
    process = start("train", *words, "--out", folder)
    deadline = time.monotonic() + 120
    while not once(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    return finish(process)


@pytest.fixture(scope="module")
def whole(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of the uninterrupted run, made by a process too."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = finish(start("train", base, data, "--out", folder, *LONG))
    assert code == 0, err
    return (folder / "adapter_model.safetensors").read_bytes()


def continued(folder: Path, whole: bytes, *words: object) -> Any:
    code, out, err = finish(start("train", *words, "--out", folder, "--json", NO_COLOR="1"))
    assert code == 0, err
    assert "\x1b" not in out + err
    assert "continued after step" in err
    assert (folder / "adapter_model.safetensors").read_bytes() == whole
    assert steps_done(folder) == 600
    return json.loads(out)


def test_interrupted_by_the_keyboard(base: str, data: str, tmp_path: Path, whole: bytes) -> None:
    code, out, err = signalled(signal.SIGINT, tmp_path / "run", base, data, *LONG)
    assert (code, out) == (130, "")
    assert "checkpoint saved" in err
    assert 30 <= steps_done(tmp_path / "run") < 600
    said = continued(tmp_path / "run", whole, base, data, *LONG)
    assert said["record"]["state"] == "finished"


@pytest.mark.full
def test_killed(base: str, data: str, tmp_path: Path, whole: bytes) -> None:
    code, _, _ = signalled(signal.SIGKILL, tmp_path / "run", base, data, *LONG, once=has_a_checkpoint)
    assert code == -signal.SIGKILL
    assert json.loads((tmp_path / "run" / "record.json").read_text())["state"] == "running"
    continued(tmp_path / "run", whole, base, data, *LONG)


def test_reader_that_goes_away(finished: Path) -> None:
    """`loratune show RUN | head -1` ends quietly."""
    process = start("show", finished, "--json")
    assert process.stdout is not None
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "command", ["generate", "eval", "chat", "merge", "export", "combine", "compare", "serve", "report"]
)
def test_a_launcher_is_for_train(cli: Any, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = cli(command, "rows.jsonl")
    assert said.code == 2
    assert f"WORLD_SIZE=2: `loratune {command}` runs in one process" in said.err
    assert "these are for train" in said.err


@pytest.mark.parametrize("processes", ["2", ""])
def test_what_writes_nothing_may_be_asked_anywhere(cli: Any, monkeypatch: pytest.MonkeyPatch, processes: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    said = cli("show", "nowhere")
    assert "WORLD_SIZE" not in said.err
    if not processes:  # set to nothing is not set
        assert "WORLD_SIZE" not in cli("merge", "nowhere", "--out", "out").err


def test_a_launched_command_still_has_its_help() -> None:
    code, out, err = finish(start("merge", "--help", WORLD_SIZE="2"))
    assert code == 0, err
    assert "--out" in out


def test_a_run_outlives_its_reader(base: str, data: str, tmp_path: Path, whole: bytes) -> None:
    """`loratune train … 2>&1 | head -1`."""
    process = start("train", base, data, "--out", tmp_path / "run", *LONG)
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == whole


def test_a_terminal_that_hangs_up_leaves_a_checkpoint(base: str, data: str, tmp_path: Path) -> None:
    code, _, err = signalled(signal.SIGHUP, tmp_path / "run", base, data, *LONG)
    assert code == 130, err
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
