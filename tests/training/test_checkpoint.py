"""A resumed run is the uninterrupted one, bit for bit; a damaged checkpoint is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.data.pack import Layout
from loratune.training.checkpoint import latest_checkpoint, restore, save_checkpoint
from tests.models import rows_of
from tests.training.loops import Training, assert_same

ROWS = rows_of(9, 14, 6, 11, 20, 8, 5, 17, 12, 7)


def resumed(folder: Path, **settings: Any) -> Training:
    """Train two steps, save, and let another object (as another process would) do the rest."""
    first = Training(ROWS, **settings).run(until=2)
    save_checkpoint(folder, first.lora, first.updater, first.progress, keep=2)
    second = Training(ROWS, **{**settings, "limit": 1})
    checkpoint, damaged = latest_checkpoint(folder)
    assert checkpoint is not None
    assert damaged == []
    # What a fresh process starts with must not matter.
    for parameter in second.lora.parameters():
        parameter.data.fill_(7.0)
    second.progress = restore(checkpoint, second.lora, second.updater)
    assert (second.progress.step, second.progress.micro_batch_tokens) == (2, settings.get("limit", 2048))
    torch.manual_seed(123456)
    return second.run()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.PADDED])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_resumed_is_uninterrupted(family: str, layout: Layout, optimizer: str, tmp_path: Path) -> None:
    """GPT-2 has dropout of its own (0.1) beside the adapter's."""
    settings = {"family": family, "layout": layout, "optimizer": optimizer, "dropout": 0.2, "limit": 30, "lr": 3e-3}
    whole = Training(ROWS, weight_decay=0.1, **settings).run()
    assert whole.model.config.model_type == family
    again = resumed(tmp_path, weight_decay=0.1, **settings)
    assert_same(again.weights(), whole.weights())
    assert [e.loss for e in again.steps_heard()] == [e.loss for e in whole.steps_heard()][2:]
    assert [e.lr for e in again.steps_heard()] == [e.lr for e in whole.steps_heard()][2:]
    assert_same(list(_tensors(again)), list(_tensors(whole)))


def _tensors(training: Training) -> list[torch.Tensor]:
    state = training.updater.state_dict()["state"]
    return [value for index in sorted(state) for _, value in sorted(state[index].items()) if torch.is_tensor(value)]


def test_planted_loss_of_the_moments_is_seen(tmp_path: Path) -> None:
    """Without the optimizer's moments the result is another one: the comparison above can fail."""
    whole = Training(ROWS).run()
    first = Training(ROWS).run(until=2)
    path = save_checkpoint(tmp_path, first.lora, first.updater, first.progress, keep=2)
    assert path.name == "step-00000002"
    second = Training(ROWS)
    checkpoint, _ = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    progress = restore(checkpoint, second.lora, second.updater)
    second.updater.state.clear()
    second.progress = progress
    with pytest.raises(AssertionError):
        assert_same(second.run().weights(), whole.weights())


def test_early_stopping_goes_on(tmp_path: Path) -> None:
    training = Training(ROWS, eval_every=1, patience=3, evaluate=lambda _: 0.25)
    training.run(until=2)
    save_checkpoint(tmp_path, training.lora, training.updater, training.progress, keep=1)
    again = Training(ROWS)
    checkpoint, _ = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    progress = restore(checkpoint, again.lora, again.updater)
    assert (progress.best_val, progress.best_step, progress.worse) == (0.25, 1, 1)
    assert not progress.stopped_early
    assert_same(progress.best, training.progress.best)
    assert len(progress.best) == len(training.lora.parameters())


def test_nothing_validated_yet(tmp_path: Path) -> None:
    training = Training(ROWS).run(until=1)
    save_checkpoint(tmp_path, training.lora, training.updater, training.progress, keep=1)
    checkpoint, _ = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    progress = restore(checkpoint, training.lora, training.updater)
    assert progress.best_val == float("inf")
    assert progress.best == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    training = Training(ROWS, steps=5, save_every=1)
    training.run(save=lambda at: save_checkpoint(tmp_path, training.lora, training.updater, at, keep=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004", "step-00000005"]
    checkpoint, _ = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 5


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    training = Training(ROWS).run(until=1)
    for _ in range(2):
        save_checkpoint(tmp_path, training.lora, training.updater, training.progress, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def damage(path: Path, how: str) -> None:
    tensors, state = path / "tensors.safetensors", path / "state.json"
    if how == "flipped bit":
        content = bytearray(tensors.read_bytes())
        content[len(content) // 2] ^= 4
        tensors.write_bytes(content)
    elif how == "cut off":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "no state":
        state.unlink()
    elif how == "broken state":
        state.write_text(state.read_text()[:-20])
    elif how == "state without a hash":
        state.write_text(json.dumps({"step": 4}))


@pytest.mark.parametrize(
    "how", ["flipped bit", "cut off", "no tensors", "no state", "broken state", "state without a hash"]
)
def test_damaged_newest_falls_back(how: str, tmp_path: Path) -> None:
    training = Training(ROWS, steps=4, save_every=2)
    training.run(save=lambda at: save_checkpoint(tmp_path, training.lora, training.updater, at, keep=2))
    damage(tmp_path / "step-00000004", how)
    checkpoint, damaged = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert len(damaged) == 1
    assert damaged[0].startswith("step-00000004 is damaged")


def test_all_damaged_or_none_there(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])
    training = Training(ROWS).run(until=1)
    path = save_checkpoint(tmp_path, training.lora, training.updater, training.progress, keep=1)
    damage(path, "flipped bit")
    checkpoint, damaged = latest_checkpoint(tmp_path)
    assert checkpoint is None
    assert len(damaged) == 1


def test_half_written_checkpoint_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(ROWS).run(until=1)
    save_checkpoint(tmp_path, training.lora, training.updater, training.progress, keep=2)
    training.run(until=2)

    def fail(value: Any) -> bytes:
        raise OSError("no space left on device")

    monkeypatch.setattr("loratune.training.checkpoint.to_json", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, training.lora, training.updater, training.progress, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
