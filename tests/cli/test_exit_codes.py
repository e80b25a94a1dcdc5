"""Refusals on the command line: the exit code, one clear message on stderr, no traceback, nothing written."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune import errors
from tests.cli.conftest import QUICK, Cli, Said
from tests.models import additions, write_jsonl

pytestmark = pytest.mark.usefixtures("fast")
Train = Callable[..., Said]


@pytest.fixture
def train(cli: Cli, base: str, data: str, tmp_path: Path) -> Train:
    """`loratune train` into a folder that must not appear where the command is refused."""

    def run(*words: object, model: object = base, rows: object = data) -> Said:
        return cli("train", model, rows, "--out", tmp_path / "run", *QUICK, *words)

    return run


def refused(said: Said, code: int, *words: str, run: Path) -> None:
    assert said.code == code, said.err
    assert said.out == ""
    for word in words:
        assert word in said.err
    assert not run.exists()


def test_every_kind_of_error_has_its_code() -> None:
    codes = {
        errors.LoratuneError: 1,
        errors.ConfigError: 2,
        errors.TargetError: 2,
        errors.MissingExtraError: 2,
        errors.DataError: 3,
        errors.CheckError: 4,
        errors.OutOfMemoryError: 5,
        errors.DivergedError: 6,
        errors.RegressionError: 7,
        errors.RunInterrupted: 130,
        errors.ModelError: 1,
        errors.AdapterFileError: 1,
        errors.RunFolderError: 1,
    }
    assert {kind: kind.exit_code for kind in codes} == codes


def test_unknown_option(train: Train, tmp_path: Path) -> None:
    refused(train("--epoch", 3), 2, "--epoch", "--epochs", run=tmp_path / "run")
    refused(train("--traget", "q_proj"), 2, "--targets", run=tmp_path / "run")


def test_unknown_command(cli: Cli) -> None:
    said = cli("trian", "model", "data")
    assert said.code == 2
    assert "train" in said.err


def test_bad_value(train: Train, tmp_path: Path) -> None:
    refused(train("--lr", "fast"), 2, "--lr", "valid number", run=tmp_path / "run")
    refused(train("--schedule", "cosin"), 2, "cosin", "cosine", run=tmp_path / "run")
    refused(train("--clip", "-1"), 2, "clip", run=tmp_path / "run")
    refused(train("--layers", "a-b"), 2, "--layers", "0,1,5-8", run=tmp_path / "run")
    refused(train("--columns", "prompt"), 2, "--columns", "ours=theirs", run=tmp_path / "run")


def test_missing_argument(cli: Cli) -> None:
    assert cli("train", "model").code == 2
    assert cli("eval", "run").code == 2


def test_unknown_target(train: Train, tmp_path: Path) -> None:
    said = train("--targets", "q_prj,v_proj")
    refused(said, 2, "'q_prj' matches no module", "'q_proj'", "gate_proj", run=tmp_path / "run")


def test_empty_file(train: Train, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    refused(train(rows=tmp_path / "empty.jsonl"), 3, "the file is empty", run=tmp_path / "run")


def test_row_without_an_answer(train: Train, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [*additions(5), {"prompt": "1 + 1 =", "completion": ""}])
    refused(train(rows=rows), 3, "rows.jsonl:6", run=tmp_path / "run")


def test_answer_cut_off(train: Train, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [*additions(5), {"prompt": "Go!", "completion": "on and " * 30}])
    said = train("--max-length", 30, "--overlong", "truncate", rows=rows)
    refused(said, 3, "rows.jsonl:6", "cut off by truncation", run=tmp_path / "run")


def test_nan_in_the_weights(train: Train, base: str, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    refused(train(model=tmp_path / "broken"), 1, "lm_head.weight: holds NaN", run=tmp_path / "run")


def test_missing_tracker(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.training.trackers.find_spec", lambda _: None)
    refused(train("--log-with", "mlflow"), 2, "mlflow is not installed", "pip install mlflow", run=tmp_path / "run")


def test_unsupported_gguf(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nonsense")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(train(model=tmp_path / "odd.gguf"), 1, "odd.gguf", "nonsense", run=tmp_path / "run")


def test_folder_with_another_run(train: Train, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = train("--seed", 9)
    assert (said.code, said.out) == (1, "")
    assert "holds another run" in said.err
    assert "seed: 0 there, 9 now" in said.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_foreign_folder(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    said = train()
    assert said.code == 1
    assert "holds other files and no run" in said.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_failed_check(train: Train) -> None:
    said = train("--lr", "1e-60")
    assert said.code == 4
    assert "✗ every B moved" in said.err
    assert "error" in said.err


def test_out_of_memory(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(importlib.import_module("loratune.training.loop"), "summed_loss", full)
    said = train("--checks", "off")
    assert said.code == 5
    assert "one row at a time" in said.err


def test_out_of_memory_in_another_command(cli: Cli, finished: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import loratune.run.answer

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")

    monkeypatch.setattr(loratune.run.answer, "held_out_loss", full)
    said = cli("eval", finished, "--data", data)
    assert said.code == 5
    assert "internal error" not in said.err


def test_divergence(train: Train) -> None:
    said = train("--lr", "1e38", "--optimizer", "sgd", "--clip", 0, "--checks", "off", "--max-steps", 20)
    assert said.code == 6
    assert "lower --lr" in said.err


@pytest.fixture
def race(cli: Cli, base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`loratune compare` in this process, of a LoRA that learns less in its few steps than all weights do."""
    # importlib gives the module, which the function of its name hides in the package.
    module = importlib.import_module("loratune.run.compare")
    monkeypatch.setattr(module, "apart", lambda function, task: function(task))
    (tmp_path / "other.txt").write_text("something else")
    quick = ("--max-steps", 4, "--lr", "1e-2", "--dtype", "fp32", "--device", "cpu", "--samples", 0, "--checks", "off")
    words = ("--methods", "lora,full", "--seeds", 1, "--answers", 0, "--elsewhere", tmp_path / "other.txt")
    return lambda *more: cli("compare", base, data, "--out", tmp_path / "c", *quick, *words, *more)


def test_a_comparison_that_is_lost(race: Train) -> None:
    lost = race("--tolerance", 0)
    assert lost.code == 7
    assert "lora is worse than full here" in lost.out
    assert "lora is worse than full here" in lost.err
    as_json = race("--tolerance", 0, "--json")
    assert as_json.code == 7
    assert as_json.json["verdict"]["regressed"] is True
    assert race("--tolerance", 0.99).code == 0


def test_a_comparison_with_a_run_that_diverges(race: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    import loratune.run.contender

    whole = loratune.run.contender.train

    def diverging(*args: Any, method: str, **settings: Any) -> Any:
        if method == "lora":
            raise errors.DivergedError("step 3: loss nan")
        return whole(*args, method=method, **settings)

    monkeypatch.setattr(loratune.run.contender, "train", diverging)
    said = race("--tolerance", 0)
    assert said.code == 6
    assert "no answer: lora, seed 0: step 3: loss nan" in said.out
    assert "lora, seed 0: step 3: loss nan" in said.err
    as_json = race("--json")
    assert as_json.code == 6
    assert as_json.json["verdict"]["regressed"] is None


def test_interrupted_and_continued(
    train: Train, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.run.journal import Journal

    hear = Journal.hear

    def interrupted(self: Journal, event: Any) -> None:
        hear(self, event)
        if getattr(event, "grad_norm", None) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "hear", interrupted)
        said = train()
    assert said.code == 130
    assert "stopped after step 2 of 6, checkpoint saved" in said.err
    assert f"--out {tmp_path / 'run'} to continue" in said.err
    assert train().code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_interrupted_before_the_first_step(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)  # another thread may take the signal; it reaches this one a moment later

    monkeypatch.setattr("loratune.training.checks.one_batch_overfits", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process of its own
    try:
        assert train().code == 130
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("words", [("--targets", "q_prj"), ("--val", "24")])
def test_error_as_json(words: tuple[str, ...], train: Train, tmp_path: Path) -> None:
    said = train("--json", *words)
    error = said.json["error"]
    assert error["exit_code"] == said.code
    assert error["kind"] == {2: "TargetError", 3: "DataError"}[said.code]
    assert error["problems"]
    assert error["hint"]


def test_internal_error_is_one_line(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("surprise")

    monkeypatch.setattr("loratune.run.setup.why_not_packed", broken)
    said = train()
    assert said.code == 1
    assert "internal error: KeyError: 'surprise'" in said.err
    assert "LORATUNE_TRACEBACK=1" in said.err


@pytest.mark.parametrize("command", ["chat", "generate", "eval", "merge"])
def test_run_that_is_not_there(command: str, cli: Cli, data: str, tmp_path: Path) -> None:
    more = {
        "chat": (),
        "generate": ("--prompts", data),
        "eval": ("--data", data),
        "merge": ("--out", tmp_path / "merged"),
    }[command]
    said = cli(command, tmp_path / "nowhere", *more)
    assert said.code == 1
    assert "nowhere" in said.err
    assert not (tmp_path / "merged").exists()


def test_show_and_report_of_nothing(cli: Cli, tmp_path: Path) -> None:
    assert cli("show", tmp_path / "nowhere").code == 1
    assert cli("report", tmp_path / "nowhere").code == 1
    assert not (tmp_path / "nowhere").exists()


def test_damaged_adapter(cli: Cli, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    said = cli("show", tmp_path / "run", "--json")
    assert said.code == 1
    assert said.json["error"]["kind"] == "AdapterFileError"


def test_record_of_an_error_is_kept(train: Train, tmp_path: Path) -> None:
    assert train("--lr", "1e-60").code == 4
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["state"] == "failed"
    assert "every B moved" in record["error"]
