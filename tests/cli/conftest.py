"""One base, one data file and one finished run for all commands; and the commands in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loratune.cli import main
from tests.models import additions, saved, write_jsonl

QUICK = ("--max-steps=6", "--lr=1e-2", "--rank=4", "--dtype=fp32", "--device=cpu", "--samples=1")


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Said]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `loratune …` here, on something that is no terminal."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return Said(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("base") / "llama"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", additions(24)))


@pytest.fixture(scope="session")
def finished(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder, to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert main(["train", base, data, "--out", str(folder), *QUICK]) == 0
    return folder


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report and no measuring of this machine."""
    import loratune.run  # noqa: F401 - what is patched must be there

    monkeypatch.setattr("loratune.run.journal.write_report", lambda *_: None)
    monkeypatch.setattr("loratune.run.setup.forward_rate", lambda *_: 1e4)
