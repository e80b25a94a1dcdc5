"""Interrupt at any time: the same command goes on, and the result is the one that an uninterrupted run gives."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loratune.cli.progress import Screen
from loratune.errors import RunFolderError, RunInterrupted
from loratune.run.events import Noticed, Said, StepDone
from tests.models import additions, tiny, write_jsonl
from tests.run.conftest import QUICK
from tests.tiny import tiny_tokenizer

Quick = Callable[..., Any]


def stop_at(step: int, number: int = signal.SIGINT) -> Callable[[Any], None]:
    """A listener that sends this process a signal when a step is done, as Ctrl-C does."""

    def listen(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), number)

    return listen


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def steps_of(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_continued(number: int, quick: Quick, finished: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RunInterrupted, match="stopped after step 2 of 6, checkpoint saved"):
        quick(tmp_path / "run", listen=stop_at(2, number))
    assert signal.getsignal(signal.SIGINT) is before
    assert record_of(tmp_path / "run")["state"] == "interrupted"
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    heard: list[Any] = []
    run = quick(tmp_path / "run", listen=heard.append)
    assert [event.step for event in heard if isinstance(event, StepDone)] == [3, 4, 5, 6]
    assert Noticed(2, "resumed", "continued after step 2") in heard
    assert adapter_bytes(run.path) == adapter_bytes(finished)
    assert steps_of(run.path) == [1, 2, 3, 4, 5, 6]
    assert run.record["state"] == "finished"
    whole = record_of(finished)
    for key in ("base_val_loss", "val_loss", "train_loss", "steps"):
        assert run.record["result"][key] == whole["result"][key], key


def test_interrupted_twice(quick: Quick, finished: Path, tmp_path: Path) -> None:
    for step in (1, 4):
        with pytest.raises(RunInterrupted):
            quick(tmp_path / "run", listen=stop_at(step))
    assert adapter_bytes(quick(tmp_path / "run").path) == adapter_bytes(finished)


def test_second_signal_stops_at_once(quick: Quick, finished: Path, tmp_path: Path) -> None:
    def twice(event: Any) -> None:
        stop_at(2)(event)
        stop_at(2)(event)

    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "run", listen=twice, save_every=1)
    assert record_of(tmp_path / "run")["state"] == "interrupted"
    assert adapter_bytes(quick(tmp_path / "run", save_every=1).path) == adapter_bytes(finished)


def test_killed_after_a_checkpoint(quick: Quick, finished: Path, tmp_path: Path) -> None:
    """A power cut leaves the record at `running`, and metrics beyond the last checkpoint, the last line cut off."""
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", listen=stop_at(4), save_every=2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    record = record_of(tmp_path / "run")
    (tmp_path / "run" / "record.json").write_text(json.dumps({**record, "state": "running"}))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run = quick(tmp_path / "run", save_every=2)
    assert adapter_bytes(run.path) == adapter_bytes(finished)
    assert steps_of(run.path) == [1, 2, 3, 4, 5, 6]


def test_damaged_checkpoint_falls_back(quick: Quick, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", listen=stop_at(4), save_every=2)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004" / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    heard: list[Any] = []
    run = quick(tmp_path / "run", listen=heard.append, save_every=2)
    assert any(event.kind == "checkpoint" and "damaged" in event.text for event in heard if isinstance(event, Noticed))
    assert [event.step for event in heard if isinstance(event, StepDone)] == [3, 4, 5, 6]
    assert adapter_bytes(run.path) == adapter_bytes(finished)


def test_model_with_its_own_dropout(tmp_path: Path, data: str) -> None:
    """GPT-2 drops activations itself; that is off in a run, so neither a resume nor a split changes the result."""
    from loratune.run import train

    settings = {**QUICK, "lora_dropout": 0.1, "samples": 0, "checks": "off", "micro_batch_tokens": 60}
    model, tokenizer = tiny("gpt2"), tiny_tokenizer()
    assert model.config.resid_pdrop == 0.1
    whole = train(model, data, tokenizer=tokenizer, out=str(tmp_path / "whole"), **settings)
    with pytest.raises(RunInterrupted):
        train(model, data, tokenizer=tokenizer, out=str(tmp_path / "cut"), listen=stop_at(3), **settings)
    cut = train(model, data, tokenizer=tokenizer, out=str(tmp_path / "cut"), **settings)
    assert adapter_bytes(cut.path) == adapter_bytes(whole.path)
    settings["micro_batch_tokens"] = 500
    other = train(model, data, tokenizer=tokenizer, out=str(tmp_path / "other"), **settings)
    losses = [losses_of(run.path) for run in (whole, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert any("dropout is off" in event["text"] for event in whole.record["events"])


def test_early_stop_survives_an_interruption(quick: Quick, tmp_path: Path) -> None:
    settings = {"early_stop": 2, "eval_every": 1, "max_steps": 100, "lr": 5e-2, "schedule": "constant", "samples": 0}
    whole = quick(tmp_path / "whole", **settings)
    best, last = whole.record["result"]["best_step"], whole.record["result"]["steps"]
    assert best < last < 100
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "cut", listen=stop_at(best), **settings)
    cut = quick(tmp_path / "cut", **settings)
    assert adapter_bytes(cut.path) == adapter_bytes(whole.path)
    assert cut.record["result"] == whole.record["result"]


def test_plan_is_kept(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batch follows the memory that was free at the start; a resumed run keeps the first plan's bits."""
    monkeypatch.setattr("loratune.run.spread.available_memory", lambda _: 310_000)
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "cut", listen=stop_at(3))
    plan = record_of(tmp_path / "cut")["plan"]
    whole = quick(tmp_path / "whole")
    monkeypatch.setattr("loratune.run.spread.available_memory", lambda _: 10**10)
    cut = quick(tmp_path / "cut")
    assert 23 <= plan["micro_batch_tokens"] < 60
    assert cut.record["plan"]["micro_batch_tokens"] == plan["micro_batch_tokens"]
    assert cut.record["settings"]["micro_batch_tokens"] == whole.record["settings"]["micro_batch_tokens"]
    assert adapter_bytes(cut.path) == adapter_bytes(whole.path)


def test_smaller_plan_can_be_asked_for(quick: Quick, finished: Path, tmp_path: Path) -> None:
    """As after running out of memory: the message says to lower the micro-batch, and then it is lowered."""
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", listen=stop_at(3), micro_batch_tokens=2048)
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", listen=stop_at(4), micro_batch_tokens=30)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["micro_batch_tokens"] == 30
    assert record_of(tmp_path / "run")["settings"]["micro_batch_tokens"] == {"value": 30, "reason": "given"}


def test_finished_folder_is_left_alone(finished: Path, quick: Quick, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    heard: list[Any] = []
    run = quick(folder, listen=heard.append)
    assert "finished already; nothing was done" in [e.text for e in heard if isinstance(e, Said)][-1]
    assert not any(isinstance(event, StepDone) for event in heard)
    assert run.record == record_of(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_was_decided_may_be_given_now(finished: Path, quick: Quick) -> None:
    """Alpha was decided as 8, and is 8.0 where somebody gives it."""
    settings = json.loads((finished / "record.json").read_text())["settings"]
    assert settings["lora_alpha"] == {"value": 8, "reason": "twice the rank"}
    assert quick(finished, lora_alpha=8.0).record["state"] == "finished"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed: 0 there, 5 now"),
        ({"lr": 2e-2}, "lr: 0.01 there, 0.02 now"),
        ({"r": 8}, "r: 4 there, 8 now"),
        ({"data": "data"}, "data_sha256: "),
        ({"model": "base"}, "base_fingerprint: "),
    ],
)
def test_folder_with_another_run(
    change: dict[str, Any], named: str, finished: Path, other_base: str, quick: Quick, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    if "data" in change:
        change = {"data": str(write_jsonl(tmp_path.parent / "others.jsonl", additions(25)[1:]))}
    if "model" in change:
        change = {"model": other_base}
    with pytest.raises(RunFolderError, match="holds another run") as caught:
        quick(tmp_path / "run", **change)
    assert named in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_changed_validation_file_is_another_run(quick: Quick, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "val.jsonl", additions(3))
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", val=str(held_out), listen=stop_at(2))
    write_jsonl(held_out, additions(4))
    with pytest.raises(RunFolderError, match="val"):
        quick(tmp_path / "run", val=str(held_out))


def test_resume_never(finished: Path, quick: Quick, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(RunFolderError, match="holds a run already"):
        quick(tmp_path / "run", resume="never")


def test_foreign_folder(quick: Quick, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="holds other files and no run"):
        quick(tmp_path)
    with pytest.raises(RunFolderError, match="is a file"):
        quick(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_with_a_broken_record(quick: Quick, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read"):
        quick(tmp_path)
    (tmp_path / "record.json").write_text("[]")
    with pytest.raises(RunFolderError, match="no record of a run"):
        quick(tmp_path)


def test_nameless_run_gets_a_name(base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratune.run import train

    monkeypatch.chdir(tmp_path)
    run = train(base, data, **{**QUICK, "samples": 0, "checks": "off", "max_steps": 1})
    assert run.path.parent.name == "runs"
    assert run.record["name"] == run.path.name
    assert (tmp_path / run.path / "adapter_model.safetensors").is_file()


def test_a_checkpoint_written_after_damaged_ones_stays(quick: Quick, finished: Path, tmp_path: Path) -> None:
    """They have higher numbers, and would otherwise count as newer."""
    run = tmp_path / "run"
    with pytest.raises(RunInterrupted):
        quick(run, save_every=1, listen=stop_at(4))
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "tensors.safetensors").write_bytes(b"cut")
    with pytest.raises(RunInterrupted):
        quick(run, save_every=1, listen=stop_at(2))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    quick(run, save_every=1)
    assert any("continued after step 2" in event["text"] for event in record_of(run)["events"])
    assert adapter_bytes(run) == adapter_bytes(finished)


def test_a_checkpoint_of_another_run_is_not_gone_on_from(quick: Quick, finished: Path, tmp_path: Path) -> None:
    for name, rate in (("run", 1e-2), ("other", 1e-3)):
        with pytest.raises(RunInterrupted):
            quick(tmp_path / name, lr=rate, listen=stop_at(3))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    quick(tmp_path / "run")
    assert any("is of another run" in event["text"] for event in record_of(tmp_path / "run")["events"])
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_finished_run_without_its_adapter_is_not_said_to_be_done(quick: Quick, tmp_path: Path, damage: str) -> None:
    quick(tmp_path / "run")
    tensors = tmp_path / "run" / "adapter_model.safetensors"
    tensors.unlink() if damage == "gone" else tensors.write_bytes(tensors.read_bytes()[:300])
    with pytest.raises(RunFolderError, match=r"the run is finished, and .*adapter_model\.safetensors"):
        quick(tmp_path / "run")


def test_who_trained_meanwhile_is_not_overwritten(
    quick: Quick, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this run's base is loaded, another command begins and ends in the same folder."""
    module = sys.modules["loratune.run.train"]
    find_base = module.find_base  # type: ignore[attr-defined]

    def slowly(*args: Any, **kwargs: Any) -> Any:
        shutil.copytree(finished, tmp_path / "run")
        return find_base(*args, **kwargs)

    monkeypatch.setattr(module, "find_base", slowly)
    with pytest.raises(RunFolderError, match="another process trained in it meanwhile"):
        quick(tmp_path / "run", r=2)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"settings": None}, "'settings' is not an object"),
        ({"settings": {"lr": 3}}, "setting 'lr' has not a value and a reason"),
        ({"events": None}, "'events' is not a list"),
        ({"events": [{}]}, "event 1 names no step"),
        ({"hardware": "2"}, "'hardware' is not an object"),
        ({"versions": ...}, "'versions' is missing"),
        ({"created": ...}, "'created' is missing"),
    ],
    ids=str,
)
def test_a_damaged_record_is_said_to_be_so(quick: Quick, tmp_path: Path, damage: dict[str, Any], said: str) -> None:
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", listen=stop_at(2))
    record = {**record_of(tmp_path / "run"), **damage}
    kept = {name: value for name, value in record.items() if value is not ...}
    (tmp_path / "run" / "record.json").write_text(json.dumps(kept))
    with pytest.raises(RunFolderError, match=said):
        quick(tmp_path / "run")
    assert record_of(tmp_path / "run") == kept


def test_metrics_that_are_gone_are_said(quick: Quick, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", listen=stop_at(2))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    heard: list[Any] = []
    quick(tmp_path / "run", listen=heard.append)
    text = "metrics.jsonl has 0 of the 2 steps that were done before: the others are in no curve"
    assert Noticed(2, "metrics", text) in heard
    assert text in [event["text"] for event in record_of(tmp_path / "run")["events"]]
    assert steps_of(tmp_path / "run") == [3, 4, 5, 6]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)
    assert "metrics" not in {event["kind"] for event in record_of(finished)["events"]}


def test_a_run_whose_steps_are_all_done_shows_no_figures_of_none(quick: Quick, tmp_path: Path) -> None:
    """It was stopped after its last step, before it was checked and written."""

    def die(event: Any) -> None:
        if isinstance(event, Said) and event.topic == "verify":
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        quick(tmp_path / "run", listen=die)
    said = io.StringIO()
    quick(tmp_path / "run", listen=Screen(Console(file=said)))
    assert "steps · all of them were done before" in said.getvalue()
    assert "nan" not in said.getvalue()
