"""Fused blocks in a run: tried, said, switched off, taken off again; the same losses either way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import ConfigError
from loratune.model import may_be_fused
from tests.models import saved, tiny
from tests.tiny import tiny_tokenizer

Quick = Callable[..., Any]


def losses(run: Any) -> list[float]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_fused_where_a_trial_says_so(quick: Quick, tmp_path: Path) -> None:
    fused, stock = quick(tmp_path / "fused"), quick(tmp_path / "stock", fused=False)
    assert fused.record["settings"]["fused"]["value"] is True
    assert "tried" in fused.record["settings"]["fused"]["reason"]
    assert stock.record["settings"]["fused"]["value"] is False
    assert losses(fused) == pytest.approx(losses(stock), rel=1e-4)
    assert losses(fused) != losses(stock)  # two roundings, so the blocks were really others


def test_a_family_without_such_blocks_says_so(quick: Quick, tmp_path: Path) -> None:
    gpt2 = str(saved(tmp_path / "gpt2", "gpt2"))
    run = quick(tmp_path / "run", model=gpt2)
    assert run.record["settings"]["fused"] == {
        "value": False,
        "reason": "this family has no blocks that can be fused",
    }
    with pytest.raises(ConfigError, match="no blocks that can be fused"):
        quick(tmp_path / "wanted", model=gpt2, fused=True)
    assert not (tmp_path / "wanted").exists()


def test_a_loaded_model_comes_back_with_its_own_blocks(quick: Quick, tmp_path: Path) -> None:
    model = tiny("llama")
    model.name_or_path = str(tmp_path)
    before = [type(module) for module in model.modules()]
    quick(tmp_path / "run", model=model, tokenizer=tiny_tokenizer())
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(("family", "gated"), [("llama", True), ("phi3", True), ("gpt2", False)])
def test_what_a_model_without_weights_says(family: str, gated: bool) -> None:
    assert may_be_fused(tiny(family).to("meta")) is gated
