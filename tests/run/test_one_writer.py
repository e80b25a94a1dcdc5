"""A run folder has one writer, on a disk that lets it write, in one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import ConfigError, DivergedError, RunFolderError
from loratune.files import locked
from loratune.run.folder import LOCK

Quick = Callable[..., Any]

_HOLD = """
import sys, time
from pathlib import Path
from loratune.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_training_here(quick: Quick, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder / LOCK)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match="another process"):
            quick(folder)
        assert [path.name for path in folder.iterdir()] == [LOCK]
    finally:
        holder.kill()
        holder.wait()
    quick(folder)  # the killed process holds nothing any more
    assert not (folder / LOCK).exists()


def test_lock_is_for_one(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock"):
        pass


def test_folder_that_cannot_be_made(quick: Quick, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="cannot be") as caught:
        quick(tmp_path / "file" / "run")
    assert "--out" in caught.value.hint


def test_disk_that_is_full(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "run" / "record.json"))

    monkeypatch.setattr("loratune.run.folder.write_json", refuse)
    with pytest.raises(RunFolderError, match=r"record\.json cannot be written: No space left"):
        quick(tmp_path / "run")


def test_processes_that_do_not_know_where_to_meet(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2, but .*RANK") as caught:
        quick(tmp_path / "run")
    assert "torchrun" in caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("when", ["base", "later"])
def test_held_out_loss_that_is_not_finite(
    when: str, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([float("nan")] if when == "base" else [2.0, float("inf")])
    monkeypatch.setattr(import_module("loratune.run.train"), "_evaluation", lambda *_: lambda _: next(losses))
    with pytest.raises(DivergedError, match="held-out loss"):
        quick(tmp_path / "run", val=4, eval_every=2)


def test_both_factors_random_is_a_start_like_any_other(quick: Quick, tmp_path: Path) -> None:
    run = quick(tmp_path / "run", init_lora_weights=False)
    names = [check["name"] for check in run.record["checks"]]
    assert "step 0 ≡ base" not in names
    assert "grads only in A, B" in names
    assert all(check["passed"] for check in run.record["checks"])


def test_loaded_model_is_not_told_to_be_elsewhere(quick: Quick, tmp_path: Path) -> None:
    from loratune.model import tiny_model

    model, tokenizer = tiny_model()
    with pytest.raises(ConfigError) as caught:
        quick(tmp_path / "run", model=model, tokenizer=tokenizer, dtype="bf16", device="meta")
    assert len(caught.value.problems) == 2
