"""Adapted layers of every kind, drawn or by hand, beside what the slow reference makes of the same tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratune.lora import AdapterState, LoraLayer, LowRank, adapt_in_place, scale_of
from loratune.quant import frozen_weight
from tests.oracle import lora_reference as oracle

SLOW = settings(derandomize=True, deadline=None, max_examples=25, database=None)
PATH = "model.layers.3.q_proj"
KINDS = ("Linear", "Conv1D")
VARIANTS = ("plain", "bias", "dora", "start", "dora from a start")


class Adapter(NamedTuple):
    r: int
    alpha: float
    rslora: bool = False
    variant: str = "plain"

    @property
    def dora(self) -> bool:
        return self.variant.startswith("dora")


@dataclass(frozen=True)
class Case:
    kind: str = "Linear"
    inner: int = 5
    outer: int = 4
    bias: bool = True
    lead: tuple[int, ...] = (3,)
    adapters: tuple[Adapter, ...] = (Adapter(2, 4.0),)
    seed: int = 0
    empty_row: bool = False


def adapters_of(*variants: str) -> st.SearchStrategy[Adapter]:
    return st.builds(
        Adapter,
        r=st.integers(1, 12),
        alpha=st.floats(0.1, 64),
        rslora=st.booleans(),
        variant=st.sampled_from(variants or VARIANTS),
    )


def cases(*variants: str, most: int = 3, width: tuple[int, int] = (1, 9)) -> st.SearchStrategy[Case]:
    """Layers whose adapters are of these variants, or of all; few features leave sums that cancel."""
    return st.builds(
        Case,
        kind=st.sampled_from(KINDS),
        inner=st.integers(*width),
        outer=st.integers(*width),
        bias=st.booleans(),
        lead=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        adapters=st.lists(adapters_of(*variants), min_size=1, max_size=most).map(tuple),
        seed=st.integers(0, 2**32),
        empty_row=st.booleans(),
    )


def base_of(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(case.seed)
    if case.kind == "Linear":
        module: nn.Module = nn.Linear(case.inner, case.outer, bias=case.bias)
    else:
        module = Conv1D(case.outer, case.inner)  # has always a bias
        nn.init.normal_(module.weight)
    nn.init.normal_(module.bias) if module.bias is not None else None
    if case.empty_row:
        with torch.no_grad():
            stored_rows(module)[0] = 0
    return module.to(dtype).requires_grad_(False)


def stored_rows(module: nn.Module) -> Tensor:
    """The stored weight as (out, in), sharing its memory."""
    weight = cast(Tensor, module._parameters["weight"])
    return weight.T if isinstance(module, Conv1D) else weight


def weight_of(module: nn.Module) -> tuple[oracle.Array, oracle.Array | None]:
    bias = module._parameters["bias"]
    return oracle.exact(stored_rows(module)), None if bias is None else oracle.exact(bias)


def low_rank_of(adapter: Adapter, inner: int, outer: int, *, p: float = 0.0) -> LowRank:
    """Drawn from torch's generator; an adapter with a start has gone a tenth of the way from it."""
    A, B = torch.randn(adapter.r, inner), torch.randn(outer, adapter.r)
    tensors: dict[str, Any] = {}
    if adapter.variant == "bias":
        tensors["bias"] = torch.randn(outer)
    if adapter.dora:
        tensors["magnitude"] = torch.rand(outer) + 0.5
    if adapter.variant.endswith("start"):
        tensors["start"] = A - 0.1 * torch.randn_like(A), B - 0.1 * torch.randn_like(B)
    scale = scale_of(adapter.r, adapter.alpha, adapter.rslora)
    return LowRank(A, B, scale=scale, dropout=p, **tensors)


def adapted(case: Case, dtype: torch.dtype = torch.float32, *, p: float = 0.0) -> tuple[LoraLayer, AdapterState]:
    state = AdapterState()
    layer = adapt_in_place(base_of(case, dtype), state, PATH, cast(Any, frozen_weight))
    for number, adapter in enumerate(case.adapters):
        layer.lora[f"adapter{number}"] = low_rank_of(adapter, case.inner, case.outer, p=p)
    state.change(active=tuple(layer.lora))
    return layer, state


def low_ranks(layer: LoraLayer) -> list[LowRank]:
    return [cast(LowRank, low_rank) for low_rank in layer.lora.values()]


def update_of(low_rank: LowRank, adapter: Adapter, mask: oracle.Array | None = None) -> oracle.Update:
    return oracle.Update(
        oracle.exact(low_rank.A),
        oracle.exact(low_rank.B),
        oracle.scale(adapter.r, adapter.alpha, rslora=adapter.rslora),
        mask,
        None if low_rank.bias is None else oracle.exact(low_rank.bias),
        None if low_rank.magnitude is None else oracle.exact(low_rank.magnitude),
        None if low_rank.A0 is None or low_rank.B0 is None else (oracle.exact(low_rank.A0), oracle.exact(low_rank.B0)),
    )


def updates_of(case: Case, layer: LoraLayer, mask: oracle.Array | None = None) -> list[oracle.Update]:
    pairs = zip(low_ranks(layer), case.adapters, strict=True)
    return [update_of(low_rank, adapter, mask) for low_rank, adapter in pairs]


def gap(ours: Any, reference: oracle.Array) -> float:
    """Relative distance by norm."""
    ours = oracle.exact(ours) if isinstance(ours, Tensor) else ours
    return float(np.linalg.norm(ours.ravel() - reference.ravel()) / max(np.linalg.norm(reference), 1e-30))
