"""A run done again from its record: the same bits, or a list of why not; and what was tampered with is found."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.errors import CheckError, RunFolderError, RunInterrupted
from loratune.run import reproduce, train
from loratune.run.events import Begun
from tests.malformed.cases import Counted
from tests.models import additions, saved, write_jsonl
from tests.run.conftest import QUICK
from tests.run.test_resume import record_of, stop_at

Quick = Callable[..., Any]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


def scaled(folder: Path, at: int, factor: float) -> None:
    """Change the loss of one step in the metrics."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for number, line in enumerate(lines):
        metric = json.loads(line)
        if metric["step"] == at and "loss" in metric:
            lines[number] = json.dumps({**metric, "loss": metric["loss"] * factor})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """Every decision is the record's, and none is made again."""
    found = reproduce(finished, out=tmp_path / "again")
    assert found.same_bits
    assert found.passed
    assert found.elsewhere == ()
    assert (found.loss, found.val_loss) == (0, 0)
    again = json.loads((tmp_path / "again" / "record.json").read_text())
    assert again["identity"] == json.loads((finished / "record.json").read_text())["identity"]
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full", "r": None, "lr": 1e-3},
        {"method": "bitfit", "r": None, "base": "gpt2"},
        {"method": "dora", "early_stop": 1, "eval_every": 1, "lr": 0.5},
        {"method": "qlora"},
        {"lora_dropout": 0.3, "val": 5, "epochs": 2.0, "max_steps": None, "warmup": 3},
        {"modules_to_save": ("lm_head",), "micro_batch_tokens": 64, "lora_plus_ratio": 4.0},
        {"group_prefixes": False, "overlong": "drop", "max_length": 22, "loss": "all"},
    ],
    ids=lambda settings: ",".join(map(str, settings)),
)
def test_whatever_was_given(settings: dict[str, Any], quick: Quick, tmp_path: Path) -> None:
    if "base" in settings:
        settings = {**settings, "model": str(saved(tmp_path / "base", settings["base"]))}
        del settings["base"]
    quick(tmp_path / "run", **settings)
    assert reproduce(tmp_path / "run").same_bits
    assert sorted(path.name for path in tmp_path.iterdir()) in (["run"], ["base", "run"])


def test_an_interrupted_run_too(quick: Quick, tmp_path: Path) -> None:
    """Its metrics have the steps once, whatever was done twice."""

    class Enough(Exception):
        pass

    def stop(event: Any) -> None:
        if getattr(event, "step", 0) == 4:
            raise Enough

    with pytest.raises(Enough):
        quick(tmp_path / "run", save_every=3, listen=stop)
    with pytest.raises(RunFolderError, match="the run failed: "):
        reproduce(tmp_path / "run")
    quick(tmp_path / "run", save_every=3)
    assert reproduce(tmp_path / "run").same_bits


@contextlib.contextmanager
def other_threads() -> Iterator[int]:
    """One thread more than before; yields how many those were."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def conditions(folder: Path) -> list[tuple[int, str]]:
    events = json.loads((folder / "record.json").read_text())["events"]
    return [(event["step"], event["text"]) for event in events if event["kind"] == "conditions"]


def test_a_run_that_went_on_under_other_conditions(quick: Quick, tmp_path: Path) -> None:
    """The record's own are those of the last steps; what the first ones had is told by an event."""
    run = tmp_path / "run"
    with other_threads() as threads, pytest.raises(RunInterrupted):
        quick(run, listen=stop_at(2))
    quick(run)
    text = f"cores {threads + 1} before, {threads} now: equal within rounding, not in bits"
    assert conditions(run) == [(2, text)]
    assert record_of(run)["hardware"]["cores"] == threads
    scaled(run, 1, 1.001)  # as other bits may come to
    found = reproduce(run)
    assert not found.same_bits
    assert found.elsewhere == (f"conditions there: {text}",)


def test_a_run_that_went_on_as_before_has_no_such_event(quick: Quick, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", listen=stop_at(2))
    quick(tmp_path / "run")
    assert conditions(tmp_path / "run") == []
    scaled(tmp_path / "run", 1, 1.001)
    with pytest.raises(CheckError, match="the same bits were expected"):
        reproduce(tmp_path / "run")


def test_conditions_of_steps_that_are_lost(quick: Quick, tmp_path: Path) -> None:
    """Conditions changed after step 4, whose checkpoint is damaged then: steps 1 and 2 were done under those before."""
    run = tmp_path / "run"
    with other_threads(), pytest.raises(RunInterrupted):
        quick(run, save_every=2, keep=3, listen=stop_at(4))
    with pytest.raises(RunInterrupted):
        quick(run, save_every=2, keep=3, listen=stop_at(5))
    for step in (4, 5):
        (run / "checkpoints" / f"step-{step:08d}" / "tensors.safetensors").write_bytes(b"")
    quick(run, save_every=2, keep=3)
    assert [step for step, _ in conditions(run)] == [2]


def test_conditions_of_a_run_that_dies_before_its_first_step(quick: Quick, tmp_path: Path) -> None:
    """Nothing was computed under its conditions, and the record keeps those of what was."""
    run = tmp_path / "run"
    with pytest.raises(RunInterrupted):
        quick(run, listen=stop_at(2))

    def die(event: Any) -> None:
        if getattr(event, "topic", "") == "checks":
            raise ValueError("enough")

    with other_threads() as threads, pytest.raises(ValueError, match="enough"):
        quick(run, listen=die)
    assert record_of(run)["hardware"]["cores"] == threads
    quick(run)
    assert conditions(run) == []
    assert reproduce(run).same_bits


def test_no_run(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        reproduce(tmp_path)
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(RunFolderError, match=r"metrics.jsonl is not there"):
        reproduce(copy)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": 3, "lo', "metrics.jsonl:4 is not JSON"),
        ("3", "metrics.jsonl:4 is 3, not an object"),
        ("{}", "metrics.jsonl:4 is no step and no validation"),
        ('{"step": "two", "val_loss": 1.0}', "metrics.jsonl:4.step is 'two', not a whole number"),
        ('{"step": 2, "val_loss": null}', "metrics.jsonl:4 is no step and no validation"),
        ('{"step": 2, "loss": 1.0}', "metrics.jsonl:4 is no step and no validation"),
        ("\xff", "metrics.jsonl:4 is not JSON"),
        ('{"step": 2, "val_loss": ' + "9" * 5000 + "}", "metrics.jsonl:4 is not JSON"),
        ("[" * 100_000, "metrics.jsonl:4 is not JSON"),
    ],
)
@pytest.mark.parametrize("then", ["reproduce", "resume"])
def test_damaged_metrics_are_refused_before_training(
    then: str, line: str, said: str, copy: Path, quick: Quick, counted: Counted
) -> None:
    lines = (copy / "metrics.jsonl").read_bytes().split(b"\n")
    assert {"loss", "step"} <= json.loads(lines[3]).keys()
    lines[3] = line.encode("latin-1")
    (copy / "metrics.jsonl").write_bytes(b"\n".join(lines))
    if then == "resume":
        changed(copy, lambda record: record.update(state="interrupted"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    heard: list[Any] = []
    with pytest.raises(RunFolderError) as caught:
        reproduce(copy, listen=heard.append) if then == "reproduce" else quick(copy, listen=heard.append)
    assert said in str(caught.value)
    assert str(copy / "metrics.jsonl") in str(caught.value)
    assert not any(isinstance(event, Begun) for event in heard)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    counted("malformed input")


def test_metrics_that_lack_steps(copy: Path) -> None:
    text = (copy / "metrics.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join([*lines[:3], *lines[4:]]))
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: step 2 is missing"):
        reproduce(copy)
    (copy / "metrics.jsonl").write_text("".join(lines[:-2]))
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: step 6 is missing"):
        reproduce(copy)
    (copy / "metrics.jsonl").write_text(text[:-9])
    with pytest.raises(RunFolderError, match=r"the last line of metrics.jsonl is half-written"):
        reproduce(copy)
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="step 1 is missing"):
        reproduce(copy)


def test_all_that_differs_is_said_at_once(copy: Path, other_base: str, tmp_path: Path) -> None:
    """Rows, base, settings and versions; nothing is trained, and nothing of the run is changed."""
    other_rows = write_jsonl(tmp_path / "rows.jsonl", additions(25))
    changed(copy, lambda record: record["versions"].update(torch="1.0"))
    changed(copy, lambda record: record["settings"]["lr"].update(value=0.5))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="cannot be done again here") as caught:
        reproduce(copy, model=other_base, data=str(other_rows), out=tmp_path / "again")
    named = {problem.split(":")[0] for problem in caught.value.problems[1:]}
    assert named >= {"base_fingerprint", "data_sha256", "lr", "torch"}
    assert "tokenizer_sha256" not in named
    assert f"torch: 1.0 there, {torch.__version__.split('+')[0]}" in str(caught.value)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "again" / "adapter_model.safetensors").exists()


def test_another_template(base: str, copy: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base, tmp_path / "moved")
    template = moved / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    with pytest.raises(RunFolderError) as caught:
        reproduce(copy, model=str(moved))
    assert [problem.split(":")[0] for problem in caught.value.problems[1:]] == ["chat_template_sha256"]


def test_rows_that_were_objects(base: str, tmp_path: Path) -> None:
    rows = additions(24)
    train(base, rows, out=str(tmp_path / "run"), **QUICK)
    with pytest.raises(RunFolderError, match="were given as objects"):
        reproduce(tmp_path / "run")
    assert reproduce(tmp_path / "run", data=rows).same_bits


def test_an_adapter_that_was_changed(copy: Path) -> None:
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckError, match="another adapter: all losses and gradient norms are the same") as caught:
        reproduce(copy)
    assert caught.value.exit_code == 4


def test_a_curve_that_was_changed(copy: Path) -> None:
    scaled(copy, 3, 1.001)
    with pytest.raises(CheckError, match=r"other bits from step 3 on: losses within 0.10%, .*, the same adapter"):
        reproduce(copy)
    # Elsewhere it is what may happen.
    changed(copy, lambda record: record["hardware"].update(processor="another"))
    found = reproduce(copy)
    assert not found.same_bits
    assert found.passed
    assert found.loss == pytest.approx(1e-3, rel=0.01)
    assert found.elsewhere[0].startswith("processor: another there")


@pytest.mark.parametrize(("factor", "passed"), [(1.015, True), (1.03, False), (float("nan"), False)])
def test_elsewhere_losses_are_within_a_band(copy: Path, factor: float, passed: bool) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for metric in lines:
        if "val_loss" in metric:
            metric["val_loss"] *= factor
    (copy / "metrics.jsonl").write_text("".join(json.dumps(metric) + "\n" for metric in lines))
    changed(copy, lambda record: record["versions"].update(torch="1.0"))
    if passed:
        assert reproduce(copy, any_versions=True).val_loss == pytest.approx(factor - 1, rel=0.05)
    else:
        with pytest.raises(CheckError, match="losses within 2% were expected"):
            reproduce(copy, any_versions=True)


def test_what_memory_forced_is_a_reason(copy: Path) -> None:
    forced = {"step": 2, "kind": "out of memory", "text": "micro-batch halved to 100 tokens"}
    changed(copy, lambda record: record["events"].append(forced))
    found = reproduce(copy)
    assert found.elsewhere == ("out of memory there: micro-batch halved to 100 tokens",)


def test_several_processes_are_a_reason(copy: Path) -> None:
    """One is started to do again what two did."""
    changed(copy, lambda record: record["plan"].update(processes=2, sharded=True))
    changed(copy, lambda record: record["settings"]["shard"].update(value="on", reason="given"))
    found = reproduce(copy)
    assert found.elsewhere == ("processes: 2 there, 1 now", "sharded: True there, False now")


def test_threads_are_those_of_the_run(copy: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    changed(copy, lambda record: record["hardware"].update(cores=before + 1))
    with contextlib.suppress(CheckError):  # by which sums may have other bits
        reproduce(copy, listen=lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_the_folder_is_new(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="exists already"):
        reproduce(finished, out=tmp_path)
