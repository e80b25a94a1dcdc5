"""Whether each process gets a copy of the base or a part, decided and refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loratune.config import TrainConfig
from loratune.errors import ConfigError
from loratune.run import spread
from loratune.run.spread import spread_out
from loratune.training.processes import Processes
from tests.models import tiny


class Several(Processes):
    count, here = 2, 2


def spread_of(model: Any, processes: Processes | None = None, **settings: Any) -> spread.Spread:
    return spread_out(model, TrainConfig(**{"device": "cpu", **settings}), processes or Several())


def test_one_process_has_nothing_to_divide(base: str) -> None:
    assert not spread_of(base, Processes()).sharded
    with pytest.raises(ConfigError, match="there is one process") as caught:
        spread_of(base, Processes(), shard="on")
    assert "torchrun" in caught.value.hint


def test_copies_unless_asked(base: str) -> None:
    assert spread_of(base).parts == 1
    assert (spread_of(base, shard="on").parts, spread_of(base, shard="on").reason) == (2, "given")


def test_all_that_cannot_be_divided_is_named(base: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spread_of(tiny(), shard="on", quant="nf4", optimizer="adamw_8bit")
    assert [problem.split(":")[1].split()[0] for problem in caught.value.problems] == ["a", "weights", "moments"]
    assert not spread_of(tiny(), quant="nf4").sharded


def test_what_accelerate_was_told(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert spread_of(base).reason == "accelerate's launch asks for it"
    assert not spread_of(base, shard="off").sharded
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError) as caught:
        spread_of(base)
    assert len(caught.value.problems) == 2
    assert not spread_of(base, Processes()).sharded, "one process is asked for nothing"


def test_a_base_that_no_gpu_holds_is_divided(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(p.numel() for p in tiny().parameters()) * 4
    monkeypatch.setattr(spread, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for share, sharded in ((0.59, False), (0.61, True)):
        monkeypatch.setattr(spread, "total_memory", lambda _, share=share: weights / share)
        assert spread_of(base, dtype="fp32").sharded == sharded
    assert spread_of(base, dtype="fp32", shard="off").device is None
    found = spread_of(base, dtype="fp32")
    monkeypatch.setattr(spread, "pick_dtype", lambda *_: type("Found", (), {"dtype": torch.bfloat16}))
    assert found.loading(TrainConfig()) == {"device": "cpu", "dtype": "bf16"}


def test_processes_share_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "available_memory", lambda _: 1000)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (spread.Spread(Several()).room(cpu), spread.Spread(Several()).room(cuda)) == (500, 1000)
    assert spread.Spread().room(cpu) == 1000
