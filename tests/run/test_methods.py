"""Every method through the one loop: what trains, what is decided, what the record and the folder say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import loratune as lt
from loratune.config import TrainConfig
from loratune.errors import ConfigError, RunInterrupted
from loratune.run.look import look_at_plan
from loratune.run.merge import merge
from loratune.run.opened import open_run
from tests.models import saved
from tests.run.conftest import opened_and_changing
from tests.run.test_resume import adapter_bytes, stop_at

Quick = Callable[..., Any]
METHODS = ["lora", "rslora", "dora", "pissa", "qlora", "vera", "ia3", "full"]
# Without a rank that could be given.
RANKLESS = ("ia3", "full")


def losses(run: Any) -> list[float]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("method", METHODS)
def test_one_word(quick: Quick, tmp_path: Path, method: str) -> None:
    run = quick(tmp_path / method, method=method, max_steps=12, **({"r": None} if method in RANKLESS else {}))
    assert run.record["state"] == "finished"
    assert all(check["passed"] for check in run.record["checks"])
    assert losses(run)[-1] < losses(run)[0]
    opened_and_changing(run, [5, 6, 7, 8])


def test_bitfit(quick: Quick, tmp_path: Path) -> None:
    gpt2 = str(saved(tmp_path / "gpt2", "gpt2"))
    run = quick(tmp_path / "run", model=gpt2, method="bitfit", r=None)
    own = open_run(str(run.path)).lora.replaced()  # type: ignore[union-attr]
    assert own
    assert all(name.endswith(".bias") for name in own)
    with pytest.raises(lt.errors.LoratuneError, match=r"no such module has a bias|nothing is left"):
        quick(tmp_path / "none", method="bitfit", r=None)


def test_full_trains_every_weight_once(quick: Quick, tmp_path: Path, base: str) -> None:
    run = quick(tmp_path / "run", method="full", r=None)
    model = AutoModelForCausalLM.from_pretrained(base)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert run.record["adapter"]["trainable"] == count
    assert run.record["settings"]["lr"]["value"] == 1e-2
    out = tmp_path / "plain"
    merge(open_run(str(run.path), decoded=True), str(out))
    plain = AutoModelForCausalLM.from_pretrained(out)
    opened = open_run(str(run.path))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(plain(ids).logits, opened.base.model(ids).logits, atol=1e-5)
    changed = [
        n for (n, a), b in zip(plain.named_parameters(), model.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert len(changed) == len(list(model.parameters()))


def test_full_is_plain_adamw(quick: Quick, tmp_path: Path, base: str, data: str) -> None:
    """Two steps on all weights equal those of a loop over the same model without any adapter."""
    settings = {"method": "full", "r": None, "max_steps": 2, "warmup": 0, "schedule": "constant", "clip": 0, "lr": 1e-3}
    run = quick(tmp_path / "run", **settings, val=0, checks="off")
    twin = quick(tmp_path / "twin", **settings, val=0, checks="off", fused=False, pack=False)
    assert losses(run) == pytest.approx(losses(twin), rel=1e-4)
    assert losses(run)[0] != losses(run)[1]


def test_rates_of_methods(quick: Quick, tmp_path: Path) -> None:
    rates = {
        method: quick(tmp_path / method, method=method, lr=None, r=None, max_steps=1).record["settings"]["lr"]["value"]
        for method in ("lora", "full")
    }
    assert rates["full"] == pytest.approx(rates["lora"] / 10, rel=0.05)


def test_qlora_knows_its_base(quick: Quick, tmp_path: Path) -> None:
    run = quick(tmp_path / "run", method="qlora")
    assert run.record["settings"]["quant"]["value"] == "nf4"
    assert run.record["base"]["quant"] == "nf4"
    opened = open_run(str(run.path))
    assert opened.base.quant == "nf4"
    plain = tmp_path / "plain"
    found = merge(open_run(str(run.path), decoded=True), str(plain))
    assert "KL" in found["verified"]
    ids = torch.tensor([[5, 6, 7, 8]])
    merged = AutoModelForCausalLM.from_pretrained(plain)
    assert torch.allclose(merged(ids).logits, opened.base.model(ids).logits, atol=1e-4)


def test_loftq_is_nearer(quick: Quick, tmp_path: Path) -> None:
    run = quick(tmp_path / "run", quant="nf4", init_lora_weights="loftq")
    (check,) = [check for check in run.record["checks"] if "nearer" in check["name"]]
    assert check["passed"]
    assert json.loads((run.path / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_qlora_goes_on_to_the_same_bits(quick: Quick, tmp_path: Path) -> None:
    quick(tmp_path / "whole", method="qlora")
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "broken", method="qlora", listen=stop_at(2))
    quick(tmp_path / "broken", method="qlora")
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "full", "r": 8}, "has none"),
        ({"method": "full", "quant": "nf4"}, "cannot be trained"),
        ({"method": "qlora", "quant": "int8"}, "contradicts"),
        ({"method": "bitfit", "use_dora": True}, "has none"),
        ({"init_lora_weights": "loftq"}, "quantising"),
        ({"quant": "nf3"}, "quant"),
        ({"method": "full", "modules_to_save": ("lm_head",)}, "all do"),
    ],
    ids=str,
)
def test_what_does_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**settings)


def test_plan_without_weights(base: str) -> None:
    plans = {method: look_at_plan(base, method=method) for method in ("lora", "qlora", "full")}
    memory = {method: found["memory"] for method, found in plans.items()}
    assert memory["qlora"]["base"] < memory["lora"]["base"]
    assert memory["full"]["optimizer"] == 8 * plans["full"]["base_parameters"]
