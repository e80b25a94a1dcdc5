"""Folding adapters into weights: what stands against it is found before the first tensor changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from loratune.adapt.placement import Placement, refuse_meta, weight_of
from loratune.errors import AdapterStateError, MergedError
from loratune.lora import LoraLayer, LowRank, OwnRows, StackedLowRank, Term, base_modules, names_by_parameter
from loratune.quant import DenseWeight, QuantizedWeight, rounded_once

_log = logging.getLogger("loratune")

# Full name of a merged tensor → what computes it; for a quantised weight, which has no tensor of its own, those that it
# is stored in.
Merged = dict[str, Callable[[], Mapping[str, Tensor]]]


class Folded(NamedTuple):
    """What a merge leaves behind.

    Attributes:
        kept: the original tensors by name, or None where nobody asked to keep them.
        missed: by module path, how far a weight in few bits is from W + ΔW, relative to ΔW.
    """

    kept: dict[str, Tensor] | None
    missed: dict[str, float]


def fold(
    placement: Placement,
    names: Sequence[str],
    *,
    keep_base: bool,
    dtype: torch.dtype,
    begin: Callable[[], None],
) -> Folded:
    """Add the named adapters' summed deltas to the weights, and put their own tensors in the base's place.

    The sum is formed in `dtype`, added to the weight in it and rounded once. Every merged tensor is computed and
    looked at before the first one is replaced.

    Args:
        begin: called right before the first tensor changes.

    Raises:
        AdapterStateError: a tied weight would part from its twin, a merged tensor would not be finite, a bias has no
            place, or the model is on the meta device.
    """
    refuse_meta(placement.model.named_parameters())
    gone = placement.gone(names)
    if gone:
        raise AdapterStateError([f"{name}: {why}" for name, why in gone.items()], hint="adapt the model as it is now")
    missed: dict[str, float] = {}
    merged, problems = _merged(placement, names, dtype, missed)
    problems |= _tied(placement, names, [name for name in merged if name not in problems])
    values: dict[str, Tensor] = {}
    for name in [name for name in merged if name not in problems]:
        found = merged[name]()
        if not all(bool(value.isfinite().all()) for value in found.values()):
            problems[name] = "the merged tensor would hold NaN or infinity"
        elif keep_base:
            values |= found
    if problems:
        raise AdapterStateError([f"{name}: {why}" for name, why in problems.items()], hint="nothing was merged")
    begin()
    if missed:
        _say(missed)
    if not keep_base:
        # Computed again: all of them at once would be the second copy of the base that nobody asked for.
        for compute in merged.values():
            for name, value in compute().items():
                placement.base_tensor(name).data.copy_(value)
        return Folded(None, missed)
    kept = {name: placement.base_tensor(name).data for name in values}
    for name, value in values.items():
        placement.base_tensor(name).data = value
    return Folded(kept, missed)


def _say(missed: Mapping[str, float]) -> None:
    """A warning that a merge into few bits rounded again, with what it cost."""
    worst = max(missed, key=missed.__getitem__)
    mean = sum(missed.values()) / len(missed)
    _log.warning(
        f"merged into few bits, which rounds {len(missed)} weights again: they are off by {mean:.0%} of what the "
        f"adapter adds, at worst {missed[worst]:.0%} ({worst}); unmerge restores them, and a base that dequantize() "
        "made dense takes the adapter without this"
    )


def unfold(placement: Placement, kept: Mapping[str, Tensor] | None) -> None:
    """Put the original tensors back: the very bits, since they were never changed."""
    if kept is None:
        raise MergedError(
            "the adapters were merged without keeping the base, which cannot be undone",
            hint="load the base again, or merge with keep_base=True",
        )
    for name, original in kept.items():
        tensor = placement.base_tensor(name)
        # The model may have moved since; where it has not, `to` returns the original itself.
        tensor.data = original.to(tensor.device, tensor.dtype)


def _merged(
    placement: Placement, names: Sequence[str], dtype: torch.dtype, missed: dict[str, float]
) -> tuple[Merged, dict[str, str]]:
    """What each tensor becomes, and why some cannot."""
    merged: Merged = {}
    problems: dict[str, str] = {}
    own = {full: parameter for name in names for full, parameter in placement.replaced_whole(name).items()}
    for full, parameter in own.items():
        merged[full] = _once(full, parameter, placement.base_tensor(full).dtype)
    for path, rows in _tables(placement, names).items():
        merged[f"{path}.weight"] = _with_rows(f"{path}.weight", placement, rows)
    for full, stacks in _stacks(placement, names).items():
        merged[full] = _stack(full, placement.base_tensor(full), stacks, own.get(full), dtype)
    for path, layer in placement.layers.items():
        terms = [cast(Term, layer.lora[name]) for name in names if name in layer.lora]
        groups = weight_of(layer).form.groups
        if groups > 1 and any(isinstance(term, LowRank) for term in terms):
            problems[f"{path}.weight"] = f"its {groups} groups are apart in the weight, and the update sees all inputs"
        elif terms:
            merged[f"{path}.weight"] = _weight(path, layer, terms, own.get(f"{path}.weight"), dtype, missed)
        biased = any(isinstance(term, LowRank) and term.bias is not None for term in terms)
        bias = layer._parameters.get("bias")
        if biased and bias is None:
            problems[f"{path}.bias"] = "the adapter has a bias behind B, and this module has none to add it to"
        elif bias is not None and any(term.bias_delta(bias) is not None for term in terms):
            merged[f"{path}.bias"] = _bias(path, layer, terms, own.get(f"{path}.bias"), dtype)
    return merged, problems


def _weight(
    path: str,
    layer: LoraLayer,
    terms: Sequence[Term],
    own: Tensor | None,
    dtype: torch.dtype,
    missed: dict[str, float],
) -> Callable[[], Mapping[str, Tensor]]:
    def values() -> Mapping[str, Tensor]:
        weight = weight_of(layer)
        dense = weight.dense(dtype)
        delta = terms[0].delta(dense)
        for term in terms[1:]:
            delta = delta + term.delta(dense)
        if own is not None:  # another adapter's, in the place of the base's: only dense ones are trained whole
            mine = replace(cast(DenseWeight, weight), parameter=nn.Parameter(own.detach().to(dtype)))
            return {f"{path}.weight": rounded_once(mine.plus(delta)["weight"], weight.dtype)}
        stored = weight.plus(delta)
        if isinstance(weight, QuantizedWeight):
            missed[path] = weight.missed(stored, delta)
        return {f"{path}.{name}": tensor for name, tensor in stored.items()}

    return values


def _stacks(placement: Placement, names: Sequence[str]) -> dict[str, list[StackedLowRank]]:
    """The terms that these adapters have on each parameter, by its full name."""
    found: dict[str, list[StackedLowRank]] = {}
    for name in names:
        for full, stack in placement.stacks(name).items():
            found.setdefault(full, []).append(stack)
    return found


def _stack(
    full: str, base: Tensor, stacks: Sequence[StackedLowRank], own: Tensor | None, dtype: torch.dtype
) -> Callable[[], Mapping[str, Tensor]]:
    """One expert after the other, so that finer than stored there is never more than one."""

    def values() -> Mapping[str, Tensor]:
        stored = (base if own is None else own).detach()
        merged = torch.empty_like(base)
        each, into = (tensor if tensor.ndim == 3 else tensor[None] for tensor in (stored, merged))
        for number, matrix in enumerate(each):
            total = stacks[0].change(number, dtype)
            for stack in stacks[1:]:
                total = total + stack.change(number, dtype)
            into[number] = rounded_once(matrix.to(dtype) + total, base.dtype)
        return {full: merged}

    return values


def _bias(
    path: str, layer: LoraLayer, terms: Sequence[Term], own: Tensor | None, dtype: torch.dtype
) -> Callable[[], Mapping[str, Tensor]]:
    def values() -> Mapping[str, Tensor]:
        base = cast(Tensor, layer._parameters["bias"])
        exact = base.detach().to(dtype)
        total = exact if own is None else own.detach().to(dtype)
        for delta in (term.bias_delta(exact) for term in terms):
            total = total if delta is None else total + delta
        return {f"{path}.bias": rounded_once(total, base.dtype)}

    return values


def _tables(placement: Placement, names: Sequence[str]) -> dict[str, list[OwnRows]]:
    """The rows that these adapters have of each table, by the path of the first module that has it."""
    found: dict[Tensor, tuple[str, list[OwnRows]]] = {}
    for name in names:
        for path, own in placement.own_rows(name).items():
            _, rows = found.setdefault(placement.base_tensor(f"{path}.weight"), (path, []))
            rows += [own] if own not in rows else []
    return dict(found.values())


def _with_rows(full: str, placement: Placement, rows: Sequence[OwnRows]) -> Callable[[], Mapping[str, Tensor]]:
    def values() -> Mapping[str, Tensor]:
        table = placement.base_tensor(full).detach()
        for own in rows:
            table = own.put_into(table).detach()
        return {full: table}

    return values


def _once(full: str, parameter: Tensor, dtype: torch.dtype) -> Callable[[], Mapping[str, Tensor]]:
    # A copy: the merged base must not share memory with the adapter.
    return lambda: {full: parameter.detach().clone().to(dtype)}


def _tied(placement: Placement, adapters: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    owners = names_by_parameter(base_modules(placement.model))
    own = {full: parameter for adapter in adapters for full, parameter in placement.replaced_whole(adapter).items()}
    sharing = {f"{path}.weight" for adapter in adapters for path in placement.own_rows(adapter)}
    problems = {}
    for name in names:
        path, _, tensor = name.rpartition(".")
        if placement.model.get_submodule(path)._parameters.get(tensor) is None:
            continue  # quantised, and nobody else's
        together = {full for full, parameter in own.items() if parameter is own.get(name)}
        together |= sharing if name in sharing else set()
        others = [owner for owner in owners[id(placement.base_tensor(name))] if owner not in {name, *together}]
        if others:
            problems[name] = f"it is tied to {', '.join(others)}, which a merge would change too"
    return problems
