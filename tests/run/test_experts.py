"""Runs that adapt stacked experts, from the command line's words to a merged base (BEHAVIOUR 7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loratune.adapter import read_adapter
from loratune.errors import AdapterFileError, RunInterrupted
from loratune.run import export, merge, open_run
from tests.models import saved
from tests.run.conftest import opened_and_changing
from tests.run.test_resume import adapter_bytes, stop_at

Quick = Callable[..., Any]
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"target_modules": "dummy-target-modules", "recompute": "on"}),
        ("gpt_oss", {"quant": "int8", "pack": False}),
    ],
)
def test_its_checks_hold_and_it_merges(quick: Quick, tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    base = str(saved(tmp_path / "base", family))
    run = quick(tmp_path / "run", model=base, target_parameters=EXPERTS, samples=0, **changes)
    assert run.record["state"] == "finished"
    assert [check for check in run.record["checks"] if not check["passed"]] == []
    names = {check["name"] for check in run.record["checks"]}
    assert {"step 0 ≡ base", "reload ≡ live", "merged ≡ adapter", "off ≡ base, on ≠ base"} <= names
    shown = {module["name"]: module for module in run.record["adapter"]["modules"]}
    up = shown["gate_up_proj (4 experts)"]
    assert (up["count"], up["each"]) == (2, 4 * 4 * (up["in"] + up["out"]))
    assert ("q_proj" in shown) == ("target_modules" not in changes)
    assert any("experts.gate_up_proj" in rank["path"] for rank in run.record["adapter"]["effective_rank"])
    model, _ = opened_and_changing(run, [5, 6, 7, 8])
    if "quant" in changes:
        return
    merge(open_run(str(run.path)), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, model(IDS).logits, atol=1e-4)


@pytest.mark.full
def test_a_run_goes_on_where_it_stopped(quick: Quick, tmp_path: Path) -> None:
    settings = {"model": str(saved(tmp_path / "base", "mixtral")), "target_parameters": EXPERTS, "checks": "off"}
    quick(tmp_path / "whole", **settings)
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "broken", **settings, listen=stop_at(2))
    quick(tmp_path / "broken", **settings)
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")


def test_readers_that_take_linear_layers_alone_are_not_given_it(quick: Quick, tmp_path: Path) -> None:
    base = str(saved(tmp_path / "base", "mixtral"))
    run = quick(tmp_path / "run", model=base, target_parameters=EXPERTS, max_steps=1, checks="off", samples=0)
    for reader in ("vllm", "gguf"):
        with pytest.raises(AdapterFileError, match=r"given linear layers alone, no stacked experts: model\.layers\.0"):
            export(str(run.path), str(tmp_path / "out"), to=reader)
    assert read_adapter(run.path).config.target_parameters == EXPERTS[::-1]
