"""Whether a smaller rank would have done: by cutting the trained update, not by guessing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratune as lt
from loratune.run.smaller import ENOUGH, smaller_ranks
from tests.models import tiny

IDS = torch.arange(24).view(2, 12)


def learned(rank: int, **settings: Any) -> tuple[Any, Any]:
    """An adapter of rank 8 whose updates have `rank` directions."""
    model = tiny("llama")
    lora = lt.attach(model, lt.LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False, **settings))
    with torch.no_grad():
        for low_rank in lora.factors().values():
            low_rank.A[rank:] = 0
    return model, lora


def distance_from(model: Any, wanted: torch.Tensor) -> Callable[[], float]:
    return lambda: 1 + float((model(IDS).logits - wanted).norm())


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_finds_the_rank_that_is_there(rank: int) -> None:
    model, lora = learned(rank)
    evaluate = distance_from(model, model(IDS).logits)
    with lora.disabled():
        base = evaluate()
    found = smaller_ranks(lora, evaluate, base=base, tuned=1.0)
    assert found is not None
    assert found["enough"] == {1: 1, 2: 2, 3: 4, 8: 8}[rank]
    for one in found["tried"]:
        assert (one["val_loss"] <= 1 + ENOUGH) is (one["r"] >= found["enough"])
    assert lora.names == lora.active == ("default",)
    assert evaluate() == 1.0


def test_nothing_is_said_where_nothing_was_learned_or_nothing_can_be_cut() -> None:
    model, lora = learned(8)
    assert smaller_ranks(lora, lambda: 1.0, base=1.0, tuned=1.0) is None
    _, dora = learned(8, use_dora=True)
    assert smaller_ranks(dora, lambda: 1.0, base=2.0, tuned=1.0) is None
    del model


def test_in_the_record_and_the_report(quick: Callable[..., Any], tmp_path: Path) -> None:
    from loratune.report import write_report

    run = quick(tmp_path / "run", val=4, max_steps=8, checks="full")
    found = json.loads((run.path / "record.json").read_text())["adapter"]["smaller_ranks"]
    assert found["tried"][0]["r"] == 2
    page = write_report(run.path).read_text()
    assert f"{found['val_loss']:.4f}" in page
