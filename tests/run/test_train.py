"""What a run leaves behind, and that it leaves what it was given alone."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from loratune.adapter import read_adapter
from loratune.config import TrainConfig
from loratune.errors import CheckError, DivergedError, OutOfMemoryError
from loratune.run.events import Begun, Noticed, Said, StepDone, Validated
from tests.models import FAMILIES, additions, tiny
from tests.tiny import tiny_tokenizer

Quick = Callable[..., Any]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_folder_of_a_finished_run(finished: Path) -> None:
    files = {path.name for path in finished.iterdir()}
    assert files >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "record.json",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "checkpoints",
    }
    assert not [name for name in files if name.startswith(".") or name.endswith(".tmp")]
    assert len(read_adapter(finished).factors) == 14
    assert AutoTokenizer.from_pretrained(finished).chat_template
    assert "Held-out loss" in (finished / "README.md").read_text()
    assert (finished / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_metrics_have_the_promised_fields(finished: Path) -> None:
    lines = lines_of(finished / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert set(line) == {
            "step", "loss", "lr", "grad_norm", "tokens", "computed_tokens", "supervised_tokens", "examples",
            "step_seconds", "peak_memory_bytes",
        }  # fmt: skip
        # The last token of a row predicts nothing, so it never goes through the model.
        assert line["computed_tokens"] < line["tokens"]
        assert 0 < line["supervised_tokens"] < line["computed_tokens"]
    validations = [line for line in lines if "val_loss" in line]
    assert all(set(line) == {"step", "val_loss"} for line in validations)
    assert (validations[0]["step"], validations[-1]["step"]) == (0, 6)
    # 22 rows for training in steps of 8: the third step of an epoch has what is left.
    assert [line["examples"] for line in steps] == [8, 8, 6, 8, 8, 6]


def test_record_explains_every_setting(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert record["state"] == "finished"
    settings = record["settings"]
    assert set(settings) <= set(TrainConfig.names())
    always = {name for name, field in TrainConfig.model_fields.items() if field.default is not None}
    decided = {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "lr", "epochs", "max_steps", "max_length", "val", "eval_every",
        "save_every", "pack", "micro_batch_tokens", "recompute", "dtype", "device",
    }  # fmt: skip
    assert always | decided <= set(settings)
    assert all(isinstance(entry["reason"], str) and entry["reason"] for entry in settings.values())
    for name in ("max_steps", "lr", "r", "samples"):
        assert settings[name]["reason"] == "given", name
    assert settings["lora_alpha"] == {"value": 8, "reason": "twice the rank"}
    assert settings["recompute"]["value"] in ("on", "off")


def test_record_holds_what_reproducing_needs(finished: Path, base: str, data: str) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert record["base"]["name"] == base
    assert record["base"]["dtype"] == "fp32"
    assert record["data"]["source"] == data
    assert (record["data"]["rows"], record["data"]["train"], record["data"]["val"]) == (24, 22, 2)
    for digest in (
        record["identity"],
        record["base"]["fingerprint"],
        record["data"]["sha256"],
        record["tokenizer"]["sha256"],
    ):
        assert len(digest) == 64
    assert {"loratune", "torch", "transformers", "python"} <= set(record["versions"])
    assert record["hardware"]["processor"]
    assert record["measured"]["tokens_per_second"] > 0
    assert record["measured"]["peak_memory_bytes"] > 0
    assert record["plan"]["estimate"]["memory_bytes"] > 0
    assert record["result"]["val_loss"] < record["result"]["base_val_loss"]
    ranks = record["adapter"]["effective_rank"]
    assert len(ranks) == 14
    assert all(0 < entry["effective"] <= entry["r"] == 4 for entry in ranks)


def test_record_holds_every_check(finished: Path) -> None:
    checks = json.loads((finished / "record.json").read_text())["checks"]
    assert all(check["passed"] and check["detail"] for check in checks)
    assert [(check["when"], check["name"]) for check in checks] == [
        ("before", "step 0 ≡ base"),
        ("before", "grads only in A, B"),
        ("before", "end of turn supervised"),
        ("before", "one batch overfits"),
        ("after", "every B moved"),
        ("after", "finite"),
        ("after", "reload ≡ live"),
        ("after", "merged ≡ adapter"),
        ("after", "off ≡ base, on ≠ base"),
    ]


def test_samples_of_base_and_tuned(quick: Quick, tmp_path: Path) -> None:
    run = quick(tmp_path / "run", samples=2)
    samples = lines_of(run.path / "samples.jsonl")
    assert len(samples) == 2
    for sample in samples:
        assert set(sample) == {"place", "prompt", "reference", "base", "tuned"}
        assert sample["prompt"].endswith("assistant\n")
        number = int(sample["prompt"].split("user\n")[1].split(" ")[0])
        assert sample["reference"] == str(2 * number + 1)
    assert samples[0]["base"] != samples[0]["tuned"]


def test_no_samples_no_checks_no_validation(quick: Quick, tmp_path: Path) -> None:
    run = quick(tmp_path / "run", samples=0, checks="off", val=0)
    assert lines_of(run.path / "samples.jsonl") == []
    assert run.record["checks"] == []
    assert all("val_loss" not in line for line in lines_of(run.path / "metrics.jsonl"))
    assert run.record["data"]["val"] == 0
    assert "Held-out" not in (run.path / "README.md").read_text()


def test_fast_checks_leave_out_the_slow_ones(quick: Quick, tmp_path: Path) -> None:
    names = {check["name"] for check in quick(tmp_path / "run", checks="fast", samples=0).record["checks"]}
    assert "every B moved" in names
    assert not names & {"one batch overfits", "merged ≡ adapter"}


def test_same_seed_same_bytes(quick: Quick, tmp_path: Path, finished: Path) -> None:
    again = quick(tmp_path / "again").path
    assert adapter_bytes(again) == adapter_bytes(finished)
    other = quick(tmp_path / "other", seed=1).path
    assert adapter_bytes(other) != adapter_bytes(finished)


def test_how_a_run_is_watched_does_not_change_it(quick: Quick, tmp_path: Path, finished: Path) -> None:
    run = quick(tmp_path / "run", samples=0, checks="off", save_every=1, keep=1)
    assert adapter_bytes(run.path) == adapter_bytes(finished)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-00000006"]


def test_micro_batches_change_the_result_by_rounding_only(quick: Quick, tmp_path: Path, finished: Path) -> None:
    run = quick(tmp_path / "run", micro_batch_tokens=25)
    assert run.record["settings"]["lora_dropout"]["value"] == 0.05
    one, many = read_adapter(finished).factors, read_adapter(run.path).factors
    for path, pair in one.items():
        for mine, theirs in zip(pair, many[path], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_listener_hears_everything_in_order(quick: Quick, tmp_path: Path) -> None:
    heard: list[Any] = []
    quick(tmp_path / "run", listen=heard.append)
    topics = [event.topic for event in heard if isinstance(event, Said)]
    assert topics == ["data", "plan", "checks", "verify", "ranks", "saved"]
    assert [event for event in heard if isinstance(event, Begun)] == [Begun(0, 6)]
    assert sum(isinstance(event, StepDone) for event in heard) == 6
    assert isinstance(heard[3], Validated)
    assert heard[3].step == 0
    plan = next(event.text for event in heard if isinstance(event, Said) and event.topic == "plan")
    assert "r=4 α=8" in plan
    assert "trainable 4,096 of 48,288" in plan


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains(family: str, quick: Quick, tmp_path: Path) -> None:
    run = quick(tmp_path / "run", model=tiny(family), tokenizer=tiny_tokenizer(), max_steps=8)
    assert run.record["base"]["family"].startswith(family)
    assert run.record["result"]["val_loss"] < run.record["result"]["base_val_loss"]


def test_loaded_model_is_given_back_untouched(quick: Quick, tmp_path: Path) -> None:
    model = tiny().requires_grad_(True)
    model.train()
    model.lm_head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    quick(tmp_path / "run", model=model, tokenizer=tiny_tokenizer(), recompute="on")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == attention
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_loaded_model_is_given_back_after_a_failure(quick: Quick, tmp_path: Path) -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(event: Any) -> None:
        if isinstance(event, StepDone):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quick(tmp_path / "run", model=model, tokenizer=tiny_tokenizer(), listen=fail)
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["state"] == "failed"
    assert "ZeroDivisionError" in record["error"]


def test_rows_in_memory(quick: Quick, tmp_path: Path, finished: Path) -> None:
    run = quick(tmp_path / "run", data=additions(24))
    assert run.record["data"]["source"] == "rows"
    assert adapter_bytes(run.path) == adapter_bytes(finished)


def test_validation_file(quick: Quick, tmp_path: Path, data: str) -> None:
    run = quick(tmp_path / "run", val=data)
    assert run.record["data"]["val"] == 24
    assert len(run.record["data"]["duplicates"]) == 24


def test_recomputing_gives_the_same_bytes(quick: Quick, tmp_path: Path, finished: Path) -> None:
    assert adapter_bytes(quick(tmp_path / "run", recompute="on").path) == adapter_bytes(finished)


def test_padding_gives_the_same_losses(quick: Quick, tmp_path: Path, finished: Path) -> None:
    run = quick(tmp_path / "run", pack=False)
    assert run.record["plan"]["packed"] is False
    losses = [[x["loss"] for x in lines_of(path / "metrics.jsonl") if "loss" in x] for path in (run.path, finished)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_failed_check_ends_the_run(quick: Quick, tmp_path: Path) -> None:
    """At a rate of 1e-60 nothing moves: the run says so instead of saving an adapter that does nothing."""
    with pytest.raises(CheckError, match="every B moved: 0/14 B moved") as caught:
        quick(tmp_path / "run", lr=1e-60)
    assert "on ≠ base" in str(caught.value)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["state"] == "failed"
    assert "every B moved" in [check["name"] for check in record["checks"] if not check["passed"]]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_failed_check_before_training_trains_nothing(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.training.checks._OVERFIT_LEAST", 0.0)
    monkeypatch.setattr("loratune.training.checks._OVERFIT_FLOOR", 0.0)
    with pytest.raises(CheckError, match="one batch overfits"):
        quick(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_divergence_is_an_error(quick: Quick, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="step "):
        quick(tmp_path / "run", lr=1e38, optimizer="sgd", clip=0.0, checks="off", max_steps=20)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_weights_that_overflow_the_model_are_a_divergence(quick: Quick, tmp_path: Path) -> None:
    """They are finite, and so is the loss, that of guessing; they are not written, and the checkpoint before stays."""
    with pytest.raises(DivergedError, match=r"step 2: loss 5.99146 after it, every one of 400 answers is as likely"):
        quick(tmp_path / "run", lr=1e3, save_every=1, keep=1)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["state"] == "failed"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("val", [0, 4])
def test_weights_that_have_grown_are_a_divergence_though_finite(quick: Quick, tmp_path: Path, val: int) -> None:
    """Losses of thousands, each of them a number: no run with such an end is a success."""
    wild: dict[str, Any] = {"method": "full", "r": None, "lr": 10.0, "schedule": "constant", "max_steps": 8, "val": val}
    with pytest.raises(DivergedError, match=r"loss \d+.*, more than 10 above that of guessing and that of the base"):
        quick(tmp_path / "run", save_every=1, keep=1, **wild)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["state"] == "failed"
    kept = tmp_path / "run" / "checkpoints"
    assert not kept.exists() or not list(kept.iterdir()), "the first step was too much already"


def test_memory_that_runs_out_outside_the_steps(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and checks take memory as well: that ends in the same kind of error, not in an internal one."""

    def full(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(importlib.import_module("loratune.run.train"), "held_out_loss", full)
    with pytest.raises(OutOfMemoryError):
        quick(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["state"] == "failed"


def test_early_stop_keeps_the_best(quick: Quick, tmp_path: Path) -> None:
    heard: list[Any] = []
    run = quick(
        tmp_path / "run", early_stop=2, eval_every=1, max_steps=200, lr=5e-2, schedule="constant", listen=heard.append
    )
    result = run.record["result"]
    kinds = [event.kind for event in heard if isinstance(event, Noticed)]
    assert "early stop" in kinds
    assert "best adapter" in kinds
    assert result["steps"] < 200
    assert result["best_step"] < result["steps"]
    losses = {event.step: event.val_loss for event in heard if isinstance(event, Validated)}
    assert result["val_loss"] == losses[result["best_step"]] == min(losses.values())
    assert {event["kind"] for event in run.record["events"]} >= {"early stop", "best adapter"}
