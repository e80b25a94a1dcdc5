"""Whether a saved adapter's tensors are those that its config asks for on this model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from loratune.adapt.plan import TargetPlan
from loratune.adapt.target import Target
from loratune.adapter import Factors, SavedAdapter
from loratune.config.methods import CALLED, LORA
from loratune.errors import AdapterFileError
from loratune.lora import names_by_parameter


def check_fit(
    model: nn.Module, target_plan: TargetPlan, saved: SavedAdapter, where: str, *, any_base: bool = False
) -> None:
    """
    Args:
        any_base: whether the base may be another one than the file's copies of its tensors are from.

    Raises:
        AdapterFileError: with one line for each tensor that is missing, too many, or of another shape.
    """
    targets = {target.filed: target for target in target_plan.targets}
    problems = [f"no tensors for {name}, which its config targets" for name in targets if name not in saved.modules]
    for name in saved.modules:
        if name not in targets:
            problems.append(f"tensors for {name}, which this model lacks or the config does not target")
        elif (name in saved.factors) != (targets[name].method == LORA):
            problems.append(f"{name}: its tensors are those of another method than {CALLED[targets[name].method]}")
        elif name in saved.factors:
            problems += _of_target(targets[name], saved.factors[name], saved)
        else:
            problems += _of_vectors(targets[name], saved)
    problems += _of_replaced(model, target_plan, saved)
    problems += _of_copies(model, target_plan, saved, any_base)
    if saved.config.decomposes and str(saved.config.init_lora_weights).startswith("pissa_niter"):
        problems.append(
            f"init_lora_weights={saved.config.init_lora_weights!r}: it counts from a start that was drawn at random, "
            "and that is not in the file"
        )
    if saved.config.init_lora_weights == "loftq":
        problems.append("init_lora_weights='loftq': it counts from weights that peft had quantised first")
    if problems:
        hint = "the adapter belongs to another base, or its folder is damaged"
        raise AdapterFileError([f"{where}: {problem}" for problem in problems], hint=hint)


def _of_target(target: Target, factors: Factors, saved: SavedAdapter) -> Iterator[str]:
    a, b = tuple(factors.A.shape), tuple(factors.B.shape)
    expected = target.shapes
    is_lookup = target.form.use == "lookup"
    if factors.looked_up != is_lookup:
        whose, kind = ("an embedding's", "none") if factors.looked_up else ("no embedding's", "one")
        yield f"{target.path}: its tensors are {whose}, and the module is {kind}"
    elif is_lookup and (a[0], b) == (target.r, expected[1]) and a[1] != target.in_features:
        yield (
            f"{target.path}: it was made for a table of {a[1]} rows, and this model's has {target.in_features}: resize "
            "its vocabulary first"
        )
    elif (a, b) != expected:
        yield f"{target.path}: A {a} and B {b}, expected {expected[0]} and {expected[1]}"
    for name, key, asked in (
        ("bias", "lora_bias", saved.config.lora_bias),
        ("magnitude", "use_dora", saved.config.use_dora),
    ):
        there = getattr(factors, name) is not None
        if there != asked:
            yield f"{target.path}: {'a' if there else 'no'} {name}, and the config says {key}={asked}"


def _of_vectors(target: Target, saved: SavedAdapter) -> Iterator[str]:
    vectors = saved.vectors[target.path]
    for (name, tensor), shape in zip(vectors.items(), target.shapes, strict=True):
        if tuple(tensor.shape) != shape:
            yield f"{target.path}: {name} {tuple(tensor.shape)}, expected {shape}"
    if saved.projections is not None and target.in_features > saved.projections[0].shape[1]:
        columns = saved.projections[0].shape[1]
        yield f"{target.path}: the projection A has {columns} columns, and the module {target.in_features} inputs"


def _of_copies(model: nn.Module, target_plan: TargetPlan, saved: SavedAdapter, any_base: bool) -> Iterator[str]:
    """What the file says of the base's tables and is not so, but for the rows that it has its own of."""
    rows = {f"{path}.weight": part.tokens for part in target_plan.token_rows for path in part.paths}
    there = dict(model.named_parameters(remove_duplicate=False))
    for name, copy in saved.copies.items():
        own = there.get(name)
        if own is None:
            yield f"a copy of {name}, which this model lacks"
        elif own.shape != copy.shape:
            yield (
                f"{name}: the file's copy of it is {tuple(copy.shape)}, and this model's is {tuple(own.shape)}: resize "
                "its vocabulary first"
            )
        elif not any_base and not own.is_meta:
            coarse = min(own.dtype, copy.dtype, key=lambda dtype: dtype.itemsize)
            differ = (own.detach().to(coarse) != copy.to(own.device, coarse)).any(1)
            differ[list(rows.get(name, ()))] = False
            if differ.any():
                yield f"{name}: {int(differ.sum())} of its rows are not the file's; any_base=True takes this model's"


def _of_replaced(model: nn.Module, target_plan: TargetPlan, saved: SavedAdapter) -> Iterator[str]:
    wanted: dict[str, tuple[int, ...]] = {}
    for rows in target_plan.token_rows:
        wanted |= dict.fromkeys(rows.full_names(), (len(rows.tokens), rows.features))
    for part in target_plan.whole:
        parameters = model.get_submodule(part.path)._parameters
        wanted |= {f"{part.path}.{name}": tuple(cast(Tensor, parameters[name]).shape) for name in part.names}
    for name, shape in wanted.items():
        if name not in saved.replaced:
            yield f"no tensor {name}, which its config saves"
        elif tuple(saved.replaced[name].shape) != shape:
            yield f"{name} {tuple(saved.replaced[name].shape)}, expected {shape}"
    yield from (f"unexpected tensor {name}" for name in saved.replaced if name not in wanted)
    if saved.config.ensure_weight_tying:
        parts = ((part.path, model.get_submodule(part.path)) for part in target_plan.whole)
        for tied in names_by_parameter(parts).values():
            there = [name for name in tied if name in saved.replaced]
            if any(not torch.equal(saved.replaced[name], saved.replaced[there[0]]) for name in there[1:]):
                yield f"{', '.join(there)}: its config ties them, and they differ"
