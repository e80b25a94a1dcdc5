"""What a run stands on goes: its data, its base, a checkpoint, memory, its numbers."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratune.training.checkpoint import latest_checkpoint
from tests.faults.conftest import Place, Whole, goes_on
from tests.faults.warmed import Warmed
from tests.models import additions, write_jsonl

Counted = Callable[..., None]


def killed_at_the_end_of_training(warmed: Warmed, place: Place, whole: Whole) -> list[Path]:
    """The folder then, and its checkpoints, the newest last."""
    fault = {"what": "kill", "at": whole.of("checkpoint")[-1]}
    assert warmed("watched", words=place.train, place=str(place.root), fault=fault).code == -signal.SIGKILL
    return sorted((place.run / "checkpoints").iterdir())


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("which", "code"), [("data", 3), pytest.param("base", 1, marks=pytest.mark.full)])
def test_vanished(
    which: str, code: int, place: Place, whole: Whole, warmed: Warmed, tmp_path: Path, counted: Counted
) -> None:
    own = dataclasses.replace(place, base=tmp_path / "base", data=tmp_path / place.data.name)
    shutil.copytree(place.base, own.base)
    shutil.copy(place.data, own.data)
    killed_at_the_end_of_training(warmed, own, whole)
    before = tree(own.run)
    gone = getattr(own, which)
    gone.rename(tmp_path / "elsewhere")
    ended = warmed("command", words=own.train)
    assert ended.is_typed, ended.printed
    assert ended.code == code
    assert str(gone) in ended.printed
    assert tree(own.run) == before
    (tmp_path / "elsewhere").rename(gone)
    assert warmed("command", words=own.train).code == 0
    assert (own.run / "adapter_model.safetensors").read_bytes() == whole.outcome.files["run/adapter_model.safetensors"]
    counted("file that vanished")


def flip(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    dice = random.Random(seed)
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut off tensors": lambda at: os.truncate(at / "tensors.safetensors", 9000),
    "no tensors": lambda at: (at / "tensors.safetensors").unlink(),
    "no state": lambda at: (at / "state.json").unlink(),
    "an empty state": lambda at: (at / "state.json").write_bytes(b""),
    "another step in the state": lambda at: (at / "state.json").write_text(
        (at / "state.json").read_text().replace('"step": 6', '"step": 5')
    ),
    "a folder for a file": lambda at: ((at / "state.json").unlink(), (at / "state.json").mkdir()),
    **{f"a bit of the tensors, {n}": lambda at, n=n: flip(at / "tensors.safetensors", n) for n in range(4)},
    **{f"a bit of the state, {n}": lambda at, n=n: flip(at / "state.json", n) for n in range(8)},
}


@pytest.mark.parametrize(
    "damage",
    [pytest.param(name, marks=() if name == "another step in the state" else pytest.mark.full) for name in DAMAGE],
)
def test_damaged_checkpoint(damage: str, place: Place, whole: Whole, warmed: Warmed, counted: Counted) -> None:
    *_, before, newest = killed_at_the_end_of_training(warmed, place, whole)
    DAMAGE[damage](newest)
    ended = goes_on(warmed, place, whole)
    assert f"{newest.name} is damaged" in ended.printed
    assert f"continued after step {int(before.name[-8:])}" in ended.printed
    counted("damage to a checkpoint")


@pytest.mark.full
def test_every_checkpoint_damaged(place: Place, whole: Whole, warmed: Warmed, counted: Counted) -> None:
    checkpoints = killed_at_the_end_of_training(warmed, place, whole)
    for checkpoint in checkpoints:
        flip(checkpoint / "tensors.safetensors", 0)
    ended = goes_on(warmed, place, whole)
    assert all(f"{checkpoint.name} is damaged" in ended.printed for checkpoint in checkpoints)
    counted("damage to a checkpoint")


@pytest.fixture(scope="module")
def large(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run whose steps take more memory than what a process has left over."""
    data = write_jsonl(tmp_path_factory.mktemp("large") / "sums.jsonl", additions(1200))
    settings = (
        "--max-steps=4", "--lr=1e-2", "--rank=4", "--dtype=fp32", "--device=cpu", "--samples=0", "--checks=off",
        "--val=0", "--batch-size=512", "--micro-batch-tokens=16384", "--save-every=2",
    )  # fmt: skip
    return Place(tmp_path_factory.mktemp("plain"), base, data, settings)


@pytest.fixture(scope="module")
def unlimited(large: Place, warmed: Warmed) -> dict[str, torch.Tensor]:
    ended = warmed("in_little_memory", words=large.train, spare=1 << 40)
    assert ended.code == 0, ended.printed
    assert "halved" not in ended.printed
    return load_file(large.run / "adapter_model.safetensors")


# With two megabytes left, what writes the checkpoint cannot have its buffer and ends the process: that is a kill.
@pytest.mark.parametrize("spare", [8 << 20, *(pytest.param(n << 20, marks=pytest.mark.full) for n in (10, 6, 4))])
def test_out_of_memory(
    spare: int, large: Place, unlimited: dict[str, torch.Tensor], warmed: Warmed, tmp_path: Path, counted: Counted
) -> None:
    """Under a real limit of the system: the micro-batch halves, also as often as it takes."""
    little = dataclasses.replace(large, root=tmp_path)
    ended = warmed("in_little_memory", words=little.train, spare=spare)
    assert ended.code == 0, ended.printed
    agrees(little, unlimited)
    counted("memory that ran out")


@pytest.mark.full
def test_out_of_memory_and_killed(
    large: Place, unlimited: dict[str, torch.Tensor], warmed: Warmed, tmp_path: Path, counted: Counted
) -> None:
    """What was halved stays halved, and the record of the run that went on says so too."""
    little = dataclasses.replace(large, root=tmp_path)
    assert warmed("in_little_memory", words=little.train, spare=8 << 20, kill_at=3).code == -signal.SIGKILL
    assert any(event["kind"] == "out of memory" for event in little.record()["events"])
    assert warmed("command", words=little.train).code == 0
    agrees(little, unlimited)
    checkpoint, _ = latest_checkpoint(little.run / "checkpoints", little.record()["identity"])
    assert checkpoint is not None
    assert checkpoint.state["micro_batch_tokens"] <= 8192
    counted("memory that ran out")


def agrees(place: Place, unlimited: dict[str, torch.Tensor]) -> None:
    halved = [event["text"] for event in place.record()["events"] if event["kind"] == "out of memory"]
    assert halved[0] == "micro-batch halved to 8192 tokens"
    found = load_file(place.run / "adapter_model.safetensors")
    assert found.keys() == unlimited.keys()
    for name, tensor in unlimited.items():
        assert float((found[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name


@pytest.mark.parametrize(
    ("what", "step", "kept"),
    [
        ("weights", 4, 2),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("loss", 5, 4), ("loss", 1, 0), ("weights", 6, 4))),
    ],
)
def test_divergence(
    what: str, step: int, kept: int, place: Place, whole: Whole, warmed: Warmed, counted: Counted
) -> None:
    """A checkpoint of weights that are not finite would be the last one, and no good."""
    ended = warmed("diverging", words=place.train, what=what, step=step)
    assert ended.code == 6, ended.printed
    assert "lower --lr" in ended.printed
    assert place.record()["state"] == "failed"
    checkpoint, damaged = latest_checkpoint(place.run / "checkpoints", place.record()["identity"])
    assert damaged == []
    assert (checkpoint.step if checkpoint else 0) == kept
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.tensors.values()) if checkpoint else True
    goes_on(warmed, place, whole)
    counted("divergence")
