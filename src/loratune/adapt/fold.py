"""Folding deltas into weights, all layers or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from loratune.errors import AdapterStateError, MergedError
from loratune.lora import LoraLayer, LowRank
from loratune.quant import FrozenWeight, frozen_weight


def fold(
    model: nn.Module, layers: Mapping[str, LoraLayer], names: Sequence[str], *, keep_base: bool, dtype: torch.dtype
) -> dict[str, Tensor] | None:
    """Add the named adapters' summed deltas to the weights.

    The sum is formed in `dtype`, added to the weight in it and rounded once. Every merged weight is computed and
    looked at before the first one is replaced.

    Returns:
        The original tensors by path, or None without `keep_base`.

    Raises:
        AdapterStateError: a tied weight would part from its twin, or a merged weight would not be finite.
    """
    weights = {path: _weight(layer) for path, layer in layers.items() if any(name in layer.lora for name in names)}
    problems = _tied(model, weights)
    for path, weight in weights.items():
        if path not in problems and not bool(_merged(weight, layers[path], names, dtype).isfinite().all()):
            problems[path] = "the merged weight would hold NaN or infinity"
    if problems:
        raise AdapterStateError([f"{path}: {why}" for path, why in problems.items()], hint="nothing was merged")
    kept: dict[str, Tensor] = {}
    for path, weight in weights.items():
        merged = _merged(weight, layers[path], names, dtype)
        if keep_base:
            kept[path] = weight.parameter.data
            weight.parameter.data = merged
        else:
            weight.parameter.data.copy_(merged)
    return kept if keep_base else None


def unfold(layers: Mapping[str, LoraLayer], kept: Mapping[str, Tensor] | None) -> None:
    """Put the original tensors back: the very bits, since they were never changed."""
    if kept is None:
        raise MergedError(
            "the adapters were merged without keeping the base, which cannot be undone",
            hint="load the base again, or merge with keep_base=True",
        )
    for path, original in kept.items():
        parameter = _weight(layers[path]).parameter
        # The model may have moved since; where it has not, `to` returns the original itself.
        parameter.data = original.to(parameter.device, parameter.dtype)


def _weight(layer: LoraLayer) -> FrozenWeight:
    return cast(FrozenWeight, frozen_weight(layer))


def _merged(weight: FrozenWeight, layer: LoraLayer, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    deltas = [cast(LowRank, layer.lora[name]).delta(dtype) for name in names if name in layer.lora]
    return weight.plus(torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0])


def _tied(model: nn.Module, weights: Mapping[str, FrozenWeight]) -> dict[str, str]:
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}")
    return {
        path: f"its weight is tied to {', '.join(o for o in owners[id(w.parameter)] if o != path + '.weight')}, "
        "which a merge would change too"
        for path, w in weights.items()
        if len(owners[id(w.parameter)]) > 1
    }
