"""Optimizers of several kinds: what they keep, that they go on after a checkpoint, and where they are not for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from loratune.config import TrainConfig
from loratune.errors import MissingExtraError
from loratune.run.decide import Decisions, decide_optimizer
from loratune.training.checkpoint import latest_checkpoint, restore, save_checkpoint
from loratune.training.loop import Progress
from loratune.training.optimizer import OPTIMIZERS, make_optimizer
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


class Two:
    """Two matrices that are drawn towards others; as much of the handle as a checkpoint asks for."""

    def __init__(self, optimizer: str) -> None:
        dice = torch.Generator().manual_seed(0)
        self.goals = [torch.randn(64, 256, generator=dice), torch.randn(40, 128, generator=dice)]
        self.own = [nn.Parameter(torch.zeros_like(goal)) for goal in self.goals]
        groups: list[dict[str, Any]] = [{"params": [p], "lr": 1e-2, "weight_decay": 0.01} for p in self.own]
        self.updater = make_optimizer(optimizer, groups, 1e-2)

    def parameters(self) -> list[nn.Parameter]:
        return self.own

    def loss(self) -> Tensor:
        return torch.stack([(p - g).square().sum() for p, g in zip(self.own, self.goals, strict=True)]).sum()

    def run(self, steps: int) -> float:
        for _ in range(steps):
            self.updater.zero_grad()
            self.loss().backward()
            self.updater.step()
        return float(self.loss().detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_it_keeps_is_what_is_planned(name: str) -> None:
    """On either side of 4,096 values, from which on moments are in eight bits, and of what trains beside matrices."""
    model = tiny(hidden_size=64, intermediate_size=256)
    config = lt.LoraConfig(r=32, target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["norm"])
    lora = lt.attach(model, config)
    sizes = list(lora.plan().sizes())
    assert sorted(sizes) == sorted(p.numel() for p in lora.parameters())
    assert min(sizes) < 4096 <= max(sizes)
    updater = make_optimizer(name, [{"params": lora.parameters()}], 1e-3)
    for parameter in lora.parameters():
        parameter.grad = torch.ones_like(parameter)
    updater.step()
    # The map from codes to values is one for all parameters; torch's count of steps is a number each.
    kept = {
        id(t): t
        for state in updater.state.values()
        for key, t in state.items()
        if torch.is_tensor(t) and not key.startswith("qmap") and key != "step"
    }
    assert sum(t.numel() * t.itemsize for t in kept.values()) == OPTIMIZERS[name].bytes_of(sizes)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "adamw" in name])
def test_kinds_of_adamw_are_near_adamw(name: str) -> None:
    start, right = Two("adamw").run(0), Two("adamw").run(30)
    assert Two(name).run(30) == pytest.approx(right, abs=0.002 * start)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = Two(name)
    whole.run(8)
    first = Two(name)
    first.run(3)
    save_checkpoint(tmp_path, first, first.updater, Progress(3, 1), keep=1)  # type: ignore[arg-type]
    checkpoint, damaged = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert not damaged
    second = Two(name)
    restore(checkpoint, second, second.updater)  # type: ignore[arg-type]
    second.run(5)
    assert all(torch.equal(a, b) for a, b in zip(second.own, whole.own, strict=True))


def test_elsewhere_than_on_cuda_plain_adamw_does_it_and_the_record_says_why() -> None:
    for name in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit"):
        decisions = Decisions(TrainConfig(optimizer=name))
        assert decide_optimizer(decisions, "cpu") is OPTIMIZERS["adamw"]
        assert decisions["optimizer"] == "adamw"
        assert decisions.reasons["optimizer"] == (
            f"{name} has kernels for CUDA only, and this is cpu; moments are in fp32"
        )
        decisions = Decisions(TrainConfig(optimizer=name))
        assert decide_optimizer(decisions, "cuda") is OPTIMIZERS[name]
        assert decisions["optimizer"] == name


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtraError, match=r"optimizer='adamw_8bit' needs the package bitsandbytes") as caught:
        Two("adamw_8bit")
    assert caught.value.hint == "pip install 'loratune[quant]'"
