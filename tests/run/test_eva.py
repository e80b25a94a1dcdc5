"""A run whose adapter starts from its data: ranks recorded, all checks passed, continued to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loratune.config import TrainConfig
from loratune.errors import ConfigError, RunInterrupted
from loratune.run import train
from loratune.run.spread import spread_out
from loratune.training.processes import Processes
from tests.run.conftest import QUICK
from tests.run.test_resume import adapter_bytes, stop_at

EVA: dict[str, Any] = {**QUICK, "init_lora_weights": "eva", "lora_dropout": 0.2, "save_every": 2, "samples": 0}


@pytest.fixture(scope="module")
def run(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, data, out=str(tmp_path_factory.mktemp("eva") / "run"), **EVA, checks="full").path


def test_every_check_passes_and_ranks_are_said(run: Path) -> None:
    record = json.loads((run / "record.json").read_text())
    assert record["state"] == "finished"
    assert all(check["passed"] for check in record["checks"])
    ranks = {module["r"] for module in record["adapter"]["modules"]}
    assert len(ranks) > 1
    config = json.loads((run / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) | {config["r"]} >= ranks
    assert config["init_lora_weights"] is True
    said = [event["text"] for event in record["events"] if event["kind"] == "start"]
    assert said == [f"A from what the layers are given in the first steps · ranks {min(ranks)} to {max(ranks)}"]


def test_continued_to_the_bit(base: str, data: str, run: Path, tmp_path: Path) -> None:
    settings = {**EVA, "checks": "full"}
    with pytest.raises(RunInterrupted):
        train(base, data, out=str(tmp_path / "run"), listen=stop_at(3), **settings)
    train(base, data, out=str(tmp_path / "run"), **settings)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(run)
    events = json.loads((tmp_path / "run" / "record.json").read_text())["events"]
    assert [event["kind"] for event in events].count("start") == 1


def test_not_in_parts() -> None:
    class Two(Processes):
        count = 2

    with pytest.raises(ConfigError, match="shard: init='eva' gives the adapter other ranks than the plan"):
        spread_out("a/base", TrainConfig(init_lora_weights="eva", shard="on", device="cpu"), Two())
