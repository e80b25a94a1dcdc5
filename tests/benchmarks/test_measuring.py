"""How benchmarks measure, and that their parity check can fail. No test looks at a time."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measuring")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    source = str(BENCHMARKS.parent / "src")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, str(BENCHMARKS)])}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def test_rounds_alternate_on_fresh_subjects_and_the_first_does_not_count(measuring: Any) -> None:
    seen: list[tuple[str, str]] = []

    def side(name: str) -> Any:
        steps = [
            measuring.Step("first", lambda s: seen.append((s, "first"))),
            measuring.Step("", lambda s: seen.append((s, "between"))),
            measuring.Step("last", lambda s: seen.append((s, "last")), 2),
        ]
        return measuring.Side(lambda: name, steps)

    found = measuring.measured({"ours": side("ours"), "peft": side("peft")}, 3)
    one = ["first", "between", "last", "last"]
    order = ["ours", "peft", "peft", "ours", "ours", "peft", "peft", "ours"]
    assert seen == [(name, step) for name in order for step in one]
    assert set(found) == {"first", "last"}
    assert {len(found[step][name]["samples"]) for step in found for name in ("ours", "peft")} == {3}
    assert len(found["last"]["ratio"]["peft"]["samples"]) == 3


def test_the_ratio_is_taken_within_a_round(measuring: Any) -> None:
    # A round ten times slower for both leaves the ratio alone; the ratio of the medians would be 2 here as well, of
    # the means it would not.
    assert measuring.ratios([2.0, 20.0, 6.0], [1.0, 10.0, 2.0])["samples"] == [2.0, 2.0, 3.0]


def test_the_spread(measuring: Any) -> None:
    assert measuring.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {
        "median": 3.0,
        "quartiles": [2.0, 4.0],
        "range": [1.0, 5.0],
        "samples": [3.0, 1.0, 2.0, 5.0, 4.0],
    }
    assert measuring.spread([0.123456])["quartiles"] == [0.1235, 0.1235]


def test_bytes_held_are_those_of_new_tensors(measuring: Any) -> None:
    def act(subject: dict[str, Any]) -> None:
        subject["new"] = torch.zeros(1000)
        subject["same storage"] = subject["new"][10:]
        torch.zeros(5000)  # let go of at once

    assert measuring.held(lambda: {"old": torch.zeros(7)}, act)["tensors"] == 4000


@pytest.mark.parametrize(("seconds", "text"), [(1.234, "1.23 s"), (0.0456, "45.6 ms"), (6.2e-7, "0.62 µs")])
def test_seconds_are_shown_in_the_unit_that_fits(measuring: Any, seconds: float, text: str) -> None:
    assert measuring.shown_seconds(seconds) == text


PLANTED = """
import sys, tempfile, pathlib, torch, adapters
attach = adapters.lt.attach
def scaled(model, what):
    handle = attach(model, what)
    with torch.no_grad():
        model.get_submodule(handle.plan().targets[0].path).weight[0] *= 1.01
    return handle
if sys.argv[1] == "planted":
    adapters.lt.attach = scaled
print(adapters.parity(2, pathlib.Path(tempfile.mkdtemp()) / "adapter"))
"""


@pytest.mark.full
def test_parity_finds_a_planted_difference() -> None:
    sound, planted = (run("-c", PLANTED, word) for word in ("sound", "planted"))
    assert sound.returncode == 0, sound.stderr
    assert planted.returncode != 0
    assert "no speed counts" in planted.stderr


@pytest.mark.full
def test_a_small_run(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run(str(BENCHMARKS / "adapters.py"), "--layers", "2", "--repeats", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {"attach", "add the 20th", "load", "save", "merge", "unmerge"} <= set(result["steps"])
    assert len(result["targets"]) == 5
    for name in (*result["steps"], *result["bytes"]):
        assert f"\n{name} " in done.stdout


def test_the_committed_result_is_of_the_whole_measurement() -> None:
    result = json.loads((BENCHMARKS / "results" / "adapters.json").read_text(encoding="utf-8"))
    assert result["model"]["targets"] == 224
    assert result["repeats"] >= 7
    assert result["parity"] < 1e-4
