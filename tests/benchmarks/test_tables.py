"""The README's rows come from the results that exist, and from nothing else."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.test_measuring import BENCHMARKS


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tables")


def result(workload: str, **sides: float) -> dict[str, Any]:
    names = {"ours": "loratune", "best": "strongest peft loop", "trl": "TRL, defaults"}
    keys = {"ours": "ours", "best": "peft-best", "trl": "trl"}
    return {
        "date": "2026-01-02",
        "hardware": {"device": "cpu", "processor": "a processor"},
        "threads": 2,
        "rounds": 3,
        "model": {"shape": "smollm2-135m", "weights": "SmolLM2-135M-Instruct"},
        "workload": {"name": workload},
        "sides": {
            keys[side]: {
                "label": names[side],
                "tokens_per_second": {"median": rate, "samples": [rate] * 3},
                "versions": {"peft": "1.2"} if side == "best" else {"torch": "3"},
            }
            for side, rate in sides.items()
        },
        "ratios": {keys[side]: {"median": sides["ours"] / rate} for side, rate in sides.items() if side != "ours"},
    }


def test_a_row_for_each_workload_and_a_column_for_each_side(tables: Any) -> None:
    rows = tables.training_table([result("dense", ours=1200, best=400), result("chats", ours=600, best=300, trl=100)])
    lines = rows.splitlines()
    assert lines[0] == "| training, tokens/s | loratune | strongest peft loop | TRL, defaults |"
    assert lines[2] == "| rows of 256 tokens, all supervised | 1,200 | 400 (3.0×) |  |"
    assert lines[3] == "| short function-calling chats | 600 | 300 (2.0×) | 100 (6.0×) |"
    assert "peft 1.2" in lines[-1]
    assert "2026-01-02" in lines[-1]


def test_says_of_how_many_rounds_the_medians_are(tables: Any) -> None:
    once, often = result("dense", ours=2, best=1), result("chats", ours=2, best=1)
    once["sides"]["peft-best"]["tokens_per_second"]["samples"] = [1.0]
    assert "medians of 1 to 3 rounds" in tables.training_table([once, often])
    assert "medians of 3 rounds" in tables.training_table([often])


def test_another_model_and_an_accelerator_are_named(tables: Any) -> None:
    other = result("dense", ours=10, best=5)
    other["model"] = {"shape": "llama-8b", "weights": "random"}
    other["hardware"] = {"device": "cuda", "processor": "an accelerator"}
    assert "| rows of 256 tokens, all supervised, shape of llama-8b, an accelerator | 10 |" in tables.training_table(
        [other]
    )


def test_only_what_was_measured_is_shown(tables: Any, tmp_path: Path) -> None:
    shutil.copy(BENCHMARKS / "results" / "demo.json", tmp_path)
    assert tables.measured(tmp_path) == tables.demo_table(json.loads((tmp_path / "demo.json").read_text()))
    for name in ("shared_prefix", "dense", "dense_cuda"):
        made = result(name.removesuffix("_cuda"), ours=2, best=1)
        (tmp_path / f"train_{name}.json").write_text(json.dumps(made))
    shown = tables.measured(tmp_path)
    assert shown.index("all supervised") < shown.index("long system prompt")


def test_lines_of_memory_and_startup(tables: Any) -> None:
    memory = {
        "step": {"ours": {"live": {"median": 2**20}}, "peft-best": {"live": {"median": 3 * 2**20}}},
        "factors": {"layers ×2": {"ours": 1.5, "peft-best": 2.0}},
    }
    assert "1 MiB against 3 of" in tables.memory_line(memory)
    assert "layers ×2: ×1.50" in tables.memory_line(memory)
    names = ("loratune --help", "first step, loratune, unchecked", "first step, loratune, checked", "first step, TRL")
    seconds = {name: {"median": float(number)} for number, name in enumerate(names, 1)}
    assert "takes 1.0 s" in tables.startup_line({"seconds": seconds})
    assert "4.0 s in TRL" in tables.startup_line({"seconds": seconds})


def test_lines_of_held_out_losses_and_of_grouping(tables: Any) -> None:
    def over(*samples: float) -> dict[str, Any]:
        return {"median": sorted(samples)[1], "range": [min(samples), max(samples)], "samples": list(samples)}

    heldout = {
        "data": {"trained": 240, "held_out": 93},
        "base": 1.4,
        "losses": {"ours": over(0.3, 0.1, 0.2), "peft-best": over(0.4, 0.5, 0.6), "peft": over(0.7, 0.8, 0.9)},
    }
    line = tables.heldout_line(heldout)
    assert "3 seeds: 0.200 (0.100 to 0.300), the strongest peft loop 0.500 (0.400 to 0.600)" in line
    assert "the base 1.400" in line
    grouping = {
        "tokens": 1000,
        "computed_tokens": {"grouped": {"median": 400.0}, "random": {"median": 900.0}},
        "val_loss_difference": over(0.01, -0.02, 0.03),
        "runs": {"random": [{}, {}, {}]},
        "base_val_loss": 0.8,
    }
    line = tables.grouping_line(grouping)
    assert "40% of the tokens are computed, in random order 90%" in line
    assert "differs by +0.010 (-0.020 to +0.030, 3 seeds; base 0.800" in line


def test_lines_of_serving(tables: Any) -> None:
    rates = {"ours": 180.0, "peft, mixed batch": 60.0, "peft, mixed batch, sorted": 90.0, "peft, switching": 18.0}
    served = {
        "work": {"adapters": 8, "callers": 32},
        "tokens_per_second": {side: {"median": rate} for side, rate in rates.items()},
        "ratios": {side: {"median": 180 / rate} for side, rate in rates.items() if side != "ours"},
        "first_token_seconds": {"median": 0.41, "p95": 2.0},
    }
    line = tables.serve_line(served)
    assert "180 tokens/s, the first one after 0.4 s (95 % within 2.0 s)" in line
    assert "60 (3.0×) in mixed batches, 90 (2.0×) in mixed batches sorted by" in line
    soaked = {"requests": 1000, "answered": 1000, "wrong": ["one"], "unloads": 7, "resident_growth": 0.004}
    assert "1,000 answered, 1 other than alone, memory +0.4%" in tables.soak_line(soaked)
