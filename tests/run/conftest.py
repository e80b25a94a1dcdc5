"""A base, data and one finished run, made once for all tests of this folder; no test may change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratune.run  # noqa: F401 - what `plain_and_fast` patches must be there
from tests.models import additions, saved, write_jsonl

# What every run here is given, so that it takes a third of a second and still does everything.
QUICK: dict[str, Any] = {"max_steps": 6, "lr": 1e-2, "r": 4, "dtype": "fp32", "device": "cpu", "samples": 1}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("base") / "llama"))


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("base") / "other", seed=1))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", additions(24)))


@pytest.fixture(autouse=True)
def plain_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report and no measuring of this machine: half of a tiny run's time. `finished` is made before, with both."""
    monkeypatch.setattr("loratune.run.journal.write_report", lambda *_: None)
    monkeypatch.setattr("loratune.run.setup.forward_rate", lambda *_: 1e4)


@pytest.fixture
def quick(base: str, data: str) -> Callable[..., Any]:
    """`train` on the base and data above; keyword arguments change its settings."""
    from loratune.run import train

    def run(out: Path, **changes: Any) -> Any:
        model, rows = changes.pop("model", base), changes.pop("data", data)
        return train(model, rows, out=str(out), **{**QUICK, **changes})

    return run


@pytest.fixture(scope="session")
def finished(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder, to be read only."""
    from loratune.run import train

    return train(base, data, out=str(tmp_path_factory.mktemp("runs") / "done"), **QUICK).path


def opened_and_changing(run: Any, tokens: list[int]) -> tuple[Any, Any]:
    """A run's model and adapter from its folder, which changes what the model makes of these tokens."""
    from loratune.run import open_run

    opened = open_run(str(run.path))
    assert opened.lora is not None
    ids = torch.tensor([tokens])
    with opened.lora.disabled():
        base = opened.base.model(ids).logits
    assert not torch.equal(opened.base.model(ids).logits, base)
    return opened.base.model, opened.lora
