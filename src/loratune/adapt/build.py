"""What an adapter holds on this model before it is put there: fresh from its config, or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratune.adapt.plan import TargetPlan
from loratune.adapt.target import Target
from loratune.adapt.vectors import fresh_vectors, saved_vectors
from loratune.adapter import Factors, SavedAdapter
from loratune.config import LoraConfig
from loratune.config.methods import LORA
from loratune.errors import AdapterStateError
from loratune.lora import (
    LowRank,
    OwnRows,
    StackedLowRank,
    Term,
    decomposed_factors,
    generator_for,
    initial_factors,
    lookup_factors,
    residual_factors,
    row_norms,
    together_again,
)
from loratune.quant import FrozenWeight, adaptable, lost, stacked_weight

# A model's modules by their path.
Modules = Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True)
class Parts:
    """Low-rank terms by module path, tensors by module path and name that stand in place of the base's, and rows.

    Terms on parameters come by the parameter's full name. Tied tensors are one parameter; rows of a table stand at each
    module that shares it.
    """

    low_ranks: dict[str, Term]
    replaced: dict[str, dict[str, Tensor]]
    rows: dict[str, OwnRows]
    stacks: dict[str, StackedLowRank]


def fresh_parts(
    modules: Modules, config: LoraConfig, plan: TargetPlan, *, ordinal: int, dtype: torch.dtype | None
) -> Parts:
    """A new adapter: A and B drawn from torch's seed, the ordinal and their path; replaced tensors copied."""
    seed = torch.initial_seed()
    low_ranks: dict[str, Term] = {}
    if config.peft_type != LORA:
        low_ranks = fresh_vectors(modules, config, plan, ordinal=ordinal, dtype=dtype)
    for target in plan.modules if config.peft_type == LORA else ():
        weight = _weight(modules, target.path)
        if (config.decomposes or config.use_dora) and not bool(weight.dense().isfinite().all()):
            raise AdapterStateError(f"{target.path}: its weight holds NaN or infinity", hint="nothing was adapted")
        factors = _fresh(config, target, modules, generator_for(seed, ordinal, target.path))
        start = (factors.A.clone(), factors.B.clone()) if config.decomposes else None
        low_ranks[target.path] = _low_rank(target, config, factors, start, weight, dtype)
    replaced = {part.path: {name: _own(modules, part.path, name, dtype) for name in part.names} for part in plan.whole}
    rows: dict[str, OwnRows] = {}
    for part in plan.token_rows:
        table = _parameter(modules, part.path, "weight").detach()
        values = table[torch.tensor(part.tokens, device=table.device)].to(dtype or _finer(table.dtype))
        rows |= dict.fromkeys(part.paths, OwnRows(values, part.tokens))
    stacks = {}
    for target in plan.stacks:
        drawn = _drawn_stack(target, config.init_lora_weights, generator_for(seed, ordinal, target.path))
        stacks[target.path] = _stacked(target, modules, *drawn, dtype)
    return Parts(low_ranks, _tied(modules, config, replaced), rows, stacks)


def saved_parts(
    modules: Modules, saved: SavedAdapter, plan: TargetPlan, *, dtype: torch.dtype | None, trainable: bool
) -> Parts:
    """Copies of a saved adapter's tensors, which fit the plan; the value may share a live adapter's.

    One that peft started from a decomposition counts from it, on a base that peft had changed: the decomposition is
    done again, and the update counted from there on the untouched base.
    """
    low_ranks: dict[str, Term] = {}
    if saved.config.peft_type != LORA:
        low_ranks = saved_vectors(modules, saved, plan, dtype=dtype, trainable=trainable)
    for target in plan.modules if saved.config.peft_type == LORA else ():
        weight = _weight(modules, target.path)
        start = None
        if saved.config.decomposes:
            began = _fresh(saved.config, target, modules, generator_for(0, target.path))
            start = began.A, began.B
        factors = saved.factors[target.path]
        least = _finer(factors.A.dtype) if trainable else None
        low_ranks[target.path] = _low_rank(target, saved.config, factors, start, weight, dtype or least)
    replaced: dict[str, dict[str, Tensor]] = {}

    def copied(full: str, device: torch.device) -> Tensor:
        # A file holds them in the base's dtype; what trains needs finer masters.
        tensor = saved.replaced[full]
        return tensor.to(device, dtype or (_finer(tensor.dtype) if trainable else tensor.dtype), copy=True)

    for part in plan.whole:
        device = _parameter(modules, part.path, part.names[0]).device
        replaced[part.path] = {name: copied(f"{part.path}.{name}", device) for name in part.names}
    rows: dict[str, OwnRows] = {}
    for table in plan.token_rows:
        (full,) = table.full_names()
        own = OwnRows(copied(full, _parameter(modules, table.path, "weight").device), table.tokens)
        rows |= dict.fromkeys(table.paths, own)
    stacks = {}
    for target in plan.stacks:
        factors = saved.factors[target.filed]
        least = _finer(factors.A.dtype) if trainable else None
        stacks[target.path] = _stacked(target, modules, factors.A, factors.B, dtype or least)
    return Parts(low_ranks, _tied(modules, saved.config, replaced), rows, stacks)


def _tied(modules: Modules, config: LoraConfig, replaced: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What stands in place of tied tensors of the base as one parameter, where the config asks for it."""
    if not config.ensure_weight_tying:
        return replaced
    one: dict[int, nn.Parameter] = {}
    return {
        path: {
            name: one.setdefault(id(_parameter(modules, path, name)), nn.Parameter(tensor))
            for name, tensor in tensors.items()
        }
        for path, tensors in replaced.items()
    }


def _fresh(config: LoraConfig, target: Target, modules: Modules, generator: torch.Generator) -> Factors:
    weight = _weight(modules, target.path)
    init, r = config.init_lora_weights, target.r
    if init == "loftq":
        residual = lost(modules[target.path])
        assert residual is not None, f"{target.path} was planned to start from what its quantisation lost"
        A, B = residual_factors(residual, r=r, scale=target.scale)
    elif config.decomposes:
        A, B = decomposed_factors(str(init), weight.dense(), r=r, scale=target.scale, generator=generator)
    else:
        A, B = _drawn(target, init, generator)
    A, B = (factor.view(shape) for factor, shape in zip((A, B), target.shapes, strict=True))
    bias = None
    if config.lora_bias:
        bias = torch.zeros(target.out_features, dtype=torch.float32, device="cpu")
        if init is False:
            bias.uniform_(-1.0, 1.0, generator=generator)
    magnitude = row_norms(weight.dense()) if config.use_dora else None
    return Factors(A, B, bias, magnitude, looked_up=target.form.use == "lookup")


def _drawn(target: Target, init: bool | str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B as matrices, A's kernels flattened."""
    r, outer, groups = target.r, target.out_features, target.form.groups
    inner = target.in_features * groups
    if target.form.use == "lookup":
        return lookup_factors(init, r=r, in_features=inner, out_features=outer, generator=generator)
    return initial_factors(
        init, r=r, in_features=inner, out_features=outer, generator=generator, groups=groups
    )  # fmt: skip


def _drawn_stack(target: Target, init: bool | str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B in the layout of a file; each expert's start as a module of its own would."""
    sizes = {"r": target.r, "in_features": target.in_features, "out_features": target.out_features}
    pairs = [initial_factors(init, **sizes, generator=generator) for _ in range(target.form.experts)]
    A, B = (torch.stack(factors) for factors in zip(*pairs, strict=True))
    return together_again(A, B)


def _stacked(target: Target, modules: Modules, A: Tensor, B: Tensor, dtype: torch.dtype | None) -> StackedLowRank:
    path, _, name = target.path.rpartition(".")
    weight = stacked_weight(modules[path], name)
    assert weight is not None, f"{target.path} was planned as a target"
    A, B = (factor.to(weight.parameter.device, dtype or factor.dtype, copy=True) for factor in (A, B))
    return StackedLowRank(
        A, B, scale=target.scale, experts=weight.experts, transposed=weight.transposed, ndim=weight.parameter.ndim
    )


def _low_rank(
    target: Target,
    config: LoraConfig,
    factors: Factors,
    start: tuple[Tensor, Tensor] | None,
    weight: FrozenWeight,
    dtype: torch.dtype | None,
) -> LowRank:
    device = weight.device
    # The magnitude is compared with a norm in fp32: rounded, the start would not be the base.
    dtypes = {"magnitude": None}
    tensors = {
        name: tensor.to(device, dtypes.get(name, dtype) or tensor.dtype, copy=True)
        for name, tensor in factors.tensors()
    }
    if start is not None:
        start = start[0].to(device, dtype or start[0].dtype), start[1].to(device, dtype or start[1].dtype)
    return LowRank(scale=target.scale, dropout=config.lora_dropout, start=start, **tensors)


def _weight(modules: Modules, path: str) -> FrozenWeight:
    weight = adaptable(modules[path])
    assert weight is not None, f"{path} was planned as a target"
    return weight


def _parameter(modules: Modules, path: str, name: str) -> nn.Parameter:
    parameter = modules[path]._parameters[name]
    assert parameter is not None, f"{path}.{name} was planned to be replaced"
    return parameter


def _own(modules: Modules, path: str, name: str, dtype: torch.dtype | None) -> Tensor:
    parameter = _parameter(modules, path, name).detach()
    return parameter.clone().to(dtype or _finer(parameter.dtype))


def _finer(dtype: torch.dtype) -> torch.dtype:
    """What masters of this dtype are kept in."""
    return torch.promote_types(dtype, torch.float32)
