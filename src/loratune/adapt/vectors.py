"""What VeRA and (IA)³ hold on a model before they are put there: fresh from a config, or from a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loratune.adapt.plan import TargetPlan
from loratune.adapt.target import Target
from loratune.adapter import SavedAdapter
from loratune.config import LoraConfig
from loratune.config.methods import IA3, VERA
from loratune.errors import AdapterStateError
from loratune.lora import Projections, Rescaling, Term, Vera, generator_for, random_projections
from loratune.quant import adaptable

# A module's tensors by their name in `SavedAdapter.vectors`.
_Vectors = Mapping[str, Tensor]


def fresh_vectors(
    modules: Mapping[str, nn.Module], config: LoraConfig, plan: TargetPlan, *, ordinal: int, dtype: torch.dtype | None
) -> dict[str, Term]:
    """Vectors that change nothing yet, or with init False random ones, drawn from torch's seed, ordinal and path."""
    seed = torch.initial_seed()
    drawn = {
        target.path: _started(config, target, generator_for(seed, ordinal, target.path)) for target in plan.targets
    }
    return _terms(modules, config, plan, drawn, None, dtype, torch.float32)


def saved_vectors(
    modules: Mapping[str, nn.Module],
    saved: SavedAdapter,
    plan: TargetPlan,
    *,
    dtype: torch.dtype | None,
    trainable: bool,
) -> dict[str, Term]:
    """Copies of a saved adapter's vectors, which fit the plan; projections that are not in it come from their seed."""
    finer = torch.float32 if trainable else None
    return _terms(modules, saved.config, plan, saved.vectors, saved.projections, dtype, finer)


def _started(config: LoraConfig, target: Target, generator: torch.Generator) -> _Vectors:
    """As in peft 0.21.2: d at its first value and b zero, l ones; without an init d and l normal, b ones."""
    random = config.init_lora_weights is False

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def full(shape: tuple[int, ...], value: float) -> Tensor:
        return torch.full(shape, value, dtype=torch.float32, device="cpu")

    if target.method == VERA:
        of_d, of_b = target.shapes
        return {"d": normal(of_d) if random else full(of_d, config.d_initial), "b": full(of_b, float(random))}
    (shape,) = target.shapes
    return {"l": normal(shape) if random else full(shape, 1.0)}


def _terms(
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    plan: TargetPlan,
    vectors: Mapping[str, _Vectors],
    projections: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype | None,
    finer: torch.dtype | None,
) -> dict[str, Term]:
    """In `dtype`, or in their own, where they are to be trained at least in `finer`."""
    if config.peft_type == VERA and projections is None and plan.targets:
        inner, outer = (max(getattr(t, name) for t in plan.targets) for name in ("in_features", "out_features"))
        projections = random_projections(config.r, inner, outer, config.projection_prng_key)
    # One for each device, which the layers there share.
    shared: dict[torch.device, Projections] = {}
    terms: dict[str, Term] = {}
    for target in plan.targets:
        weight = adaptable(modules[target.path])
        assert weight is not None, f"{target.path} was planned as a target"
        device = weight.device
        if target.method == IA3 and dtype is not None and dtype.itemsize < torch.float32.itemsize:
            hint = "leave dtype out: (IA)³ has few values"
            raise AdapterStateError(f"factors near 1 cannot be {dtype}, whose steps there are too wide", hint=hint)
        own = {
            name: tensor.to(device, _dtype(tensor, dtype, finer), copy=True).flatten()
            for name, tensor in vectors[target.path].items()
        }
        if projections is None:
            terms[target.path] = Rescaling(own["l"], on_input=target.on_input, groups=target.form.groups)
            continue
        if device not in shared:
            shared[device] = Projections(*(tensor.to(device, copy=True) for tensor in projections))
        terms[target.path] = Vera(own["d"], own["b"], shared[device], target.in_features, config.lora_dropout)
    return terms


def _dtype(tensor: Tensor, dtype: torch.dtype | None, finer: torch.dtype | None) -> torch.dtype:
    least = tensor.dtype if finer is None else torch.promote_types(tensor.dtype, finer)
    return dtype or least
