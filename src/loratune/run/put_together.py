"""The model of a sharded run in one piece again: a base loaded anew, with what was trained on it.

A sharded model cannot be checked, merged or asked for answers by one process. The base never changed, so that its files
still hold it; the checks after training then also say that it is the one that was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratune.adapt import Adapters, attach
from loratune.model import available_memory, find_base, why_not_fused, why_not_packed
from loratune.run.proof import Proof
from loratune.run.setup import Setup
from loratune.run.spread import Spread
from loratune.training.sharding import whole

# Beside its weights the whole base needs room for checks and answers.
_ROOM = 1.5


@dataclass(frozen=True)
class Trained:
    """Whole tensors of an adapter, on the CPU: what trains, and what its updates count from."""

    parameters: list[Tensor]
    starts: list[Tensor]


def trained_tensors(lora: Adapters) -> Trained:
    """Every process must ask; each gets all."""
    parameters = [whole(parameter.detach()).cpu() for parameter in lora.parameters()]
    return Trained(parameters, [start.detach().cpu() for start in _starts(lora)])


def put_together(setup: Setup, trained: Trained) -> tuple[Setup, Adapters, Proof]:
    """The run as one process would have it after its last step: set-up, adapter, and the base's answers from before."""
    decisions = setup.decisions
    device = setup.device
    if device.type != "cpu" and available_memory(device) < _ROOM * setup.memory.base * setup.processes.count:
        device = torch.device("cpu")
    base = find_base(setup.base.name, setup.base.tokenizer, dtype=decisions["dtype"], device=str(device))
    # Both leave the model with the kernels that they tried.
    if decisions["pack"]:
        why_not_packed(base.model)
    if decisions["fused"]:
        why_not_fused(base.model)
    again = replace(setup, base=base, spread=Spread())
    torch.manual_seed(decisions["seed"])
    proof = Proof(again)
    fresh = attach(again.model, again.lora)
    proof.remember(fresh)
    with torch.no_grad():
        pairs = [
            *zip(fresh.parameters(), trained.parameters, strict=True),
            *zip(_starts(fresh), trained.starts, strict=True),
        ]
        for tensor, found in pairs:
            tensor.copy_(found)
    return again, fresh, proof


def _starts(lora: Adapters) -> list[Tensor]:
    return [tensor for low_rank in lora.factors().values() for tensor in low_rank.buffers()]
