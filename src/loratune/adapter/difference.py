"""How far two adapters are apart, module by module, from their factors alone, in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loratune.adapter.spectrum import alive, decomposed, layer_order, singular_values
from loratune.adapter.stacks import KNOWN_BY_BASE, by_expert, stack_problems
from loratune.adapter.value import SavedAdapter
from loratune.errors import AdapterFileError, ConfigError


@dataclass(frozen=True)
class Distance:
    """Two updates ΔW_a and ΔW_b beside each other; all norms are Frobenius norms.

    Attributes:
        norm_a, norm_b, distance: ‖ΔW_a‖, ‖ΔW_b‖ and ‖ΔW_a − ΔW_b‖.
        ratio: ‖ΔW_b‖ / ‖ΔW_a‖; None where ΔW_a is zero.
        relative: ‖ΔW_a − ΔW_b‖ over the larger of both norms; 0 where both are zero.
        cosine: ⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖); None where one is zero.
    """

    norm_a: float
    norm_b: float
    distance: float
    ratio: float | None
    relative: float
    cosine: float | None


@dataclass(frozen=True)
class ModuleDifference(Distance):
    """One module that both adapters have.

    Attributes:
        input_overlap, output_overlap: ‖U_aᵀ U_b‖² / min(i, j) for the i and j directions of the two updates, from 0
            (orthogonal) to 1 (one contains the other): Hu et al., arXiv:2106.09685, section 7.2, equation 4. Input
            directions are right singular vectors, output directions left ones, each with a singular value above 1e-6 of
            the largest. None where an update is zero.
    """

    path: str
    input_overlap: float | None
    output_overlap: float | None


@dataclass(frozen=True)
class Difference:
    """Two adapters beside each other.

    Attributes:
        modules: those that both have, layer 2 before layer 10.
        only_a, only_b: paths of modules that one of them has.
        total: over all modules; where an adapter has no such module its update is zero.
        settings: name → what a and b say, where they differ.
        tensors: biases, magnitudes and replaced tensors of the base that are not equal, or that only one has. They are
            no part of the updates above.
    """

    modules: tuple[ModuleDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    total: Distance
    settings: Mapping[str, tuple[Any, Any]]
    tensors: tuple[str, ...]


class _Update(NamedTuple):
    """An update's factors, with the scale in B, and its singular value decomposition."""

    A: Tensor
    B: Tensor
    U: Tensor
    sigma: Tensor
    Vh: Tensor


def diff(a: SavedAdapter, b: SavedAdapter) -> Difference:
    """Compare the updates scale · B A of two adapters.

    Raises:
        ConfigError: what is no adapter.
        AdapterFileError: modules of other shapes, NaN or infinity, an update that counts from a base which peft had
            changed; every problem.
    """
    _refuse(a, b)
    a, b = by_expert(a), by_expert(b)
    modules, inner = [], 0.0
    for path in sorted(a.factors.keys() & b.factors.keys(), key=layer_order):
        x, y = _update(a, path), _update(b, path)
        inner += _inner(x, y)
        modules.append(_compared(path, x, y))
    only_a = tuple(sorted(a.factors.keys() - b.factors.keys(), key=layer_order))
    only_b = tuple(sorted(b.factors.keys() - a.factors.keys(), key=layer_order))
    alone_a, alone_b = ([_norm(adapter, path) for path in only] for adapter, only in ((a, only_a), (b, only_b)))
    total = _distance(
        math.hypot(*alone_a, *(module.norm_a for module in modules)),
        math.hypot(*alone_b, *(module.norm_b for module in modules)),
        math.hypot(*alone_a, *alone_b, *(module.distance for module in modules)),
        inner,
    )
    return Difference(tuple(modules), only_a, only_b, Distance(**total), _settings(a, b), _tensors(a, b))


def _refuse(a: SavedAdapter, b: SavedAdapter) -> None:
    given: tuple[tuple[str, object], ...] = (("the first", a), ("the second", b))
    strange = [
        f"{word} is a {type(it).__name__}, not a SavedAdapter" for word, it in given if not isinstance(it, SavedAdapter)
    ]
    if strange:
        raise ConfigError(strange, hint="read_adapter(folder) reads one")
    problems = [
        f"{path}: {x.shown} in one and {y.shown} in the other"
        for path, x in sorted(a.factors.items())
        if (y := b.factors.get(path)) is not None
        if x.shown != y.shown
    ]
    hint = "compare adapters of one base" if problems else "`loratune show` says more about a damaged adapter"
    for word, adapter in (("the first adapter", a), ("the second adapter", b)):
        bad = [name for name, tensor in adapter.named_tensors() if not tensor.isfinite().all()]
        problems += [f"{word}: {name} holds NaN or infinity" for name in bad]
        if adapter.vectors:
            problems.append(f"{word} holds no low-rank tensors{adapter.instead}")
            hint = "compare what the two models answer"
        if adapter.config.decomposes:
            problems.append(f"{word} starts from {adapter.config.init_lora_weights!r}: it counts from a changed base")
            hint = "attach it to its base and save it, which writes a plain adapter"
    stacks = list(stack_problems([a, b], ["the first adapter", "the second adapter"]))
    if stacks:
        problems, hint = problems + stacks, KNOWN_BY_BASE
    if problems:
        raise AdapterFileError(problems, hint=hint)


def _update(adapter: SavedAdapter, path: str) -> _Update:
    A, B = adapter.factors[path].matrices()
    A, B = A.detach().cpu().double(), B.detach().cpu().double() * adapter.scale(path)
    return _Update(A, B, *decomposed(A, B))


def _norm(adapter: SavedAdapter, path: str) -> float:
    A, B = adapter.factors[path].matrices()
    return float(singular_values(A, B).norm()) * adapter.scale(path)


def _inner(x: _Update, y: _Update) -> float:
    """⟨ΔW_x, ΔW_y⟩ = Σᵢⱼ σᵢ τⱼ (uᵢ·u'ⱼ)(vᵢ·v'ⱼ)."""
    return float(x.sigma @ ((x.U.T @ y.U) * (x.Vh @ y.Vh.T)) @ y.sigma)


def _compared(path: str, x: _Update, y: _Update) -> ModuleDifference:
    i, j = alive(x.sigma), alive(y.sigma)
    values = _distance(float(x.sigma.norm()), float(y.sigma.norm()), _apart(x, y), _inner(x, y))
    return ModuleDifference(
        **values,
        path=path,
        input_overlap=_overlap(x.Vh[:i].T, y.Vh[:j].T),
        output_overlap=_overlap(x.U[:, :i], y.U[:, :j]),
    )


def _apart(x: _Update, y: _Update) -> float:
    """‖ΔW_x − ΔW_y‖ as the norm of one update with the factors of both.

    ‖x‖² + ‖y‖² − 2⟨x, y⟩ would lose half of the digits where the two are nearly equal.
    """
    if torch.equal(x.A, y.A) and torch.equal(x.B, y.B):
        return 0.0
    return float(singular_values(torch.cat([x.A, y.A]), torch.cat([x.B, -y.B], dim=1)).norm())


def _overlap(U: Tensor, V: Tensor) -> float | None:
    """‖Uᵀ V‖² / min(i, j) for orthonormal columns U (n, i) and V (n, j)."""
    fewer = min(U.shape[1], V.shape[1])
    return min(1.0, float((U.T @ V).square().sum()) / fewer) if fewer else None


def _distance(norm_a: float, norm_b: float, distance: float, inner: float) -> dict[str, Any]:
    larger = max(norm_a, norm_b)
    return {
        "norm_a": norm_a,
        "norm_b": norm_b,
        "distance": distance,
        "ratio": norm_b / norm_a if norm_a else None,
        "relative": distance / larger if larger else 0.0,
        "cosine": max(-1.0, min(1.0, inner / norm_a / norm_b)) if norm_a and norm_b else None,
    }


def _settings(a: SavedAdapter, b: SavedAdapter) -> dict[str, tuple[Any, Any]]:
    x, y = (
        {**each.config.model_dump(mode="json"), "base": each.base, "revision": each.revision}
        | {f"origin.{name}": value for name, value in asdict(each.origin).items()}
        for each in (a, b)
    )
    return {name: (x[name], y[name]) for name in x if x[name] != y[name]}


def _tensors(a: SavedAdapter, b: SavedAdapter) -> tuple[str, ...]:
    x, y = _beside(a), _beside(b)
    return tuple(
        name for name in sorted(x.keys() | y.keys()) if not (name in x and name in y and torch.equal(x[name], y[name]))
    )


def _beside(adapter: SavedAdapter) -> dict[str, Tensor]:
    """What stands beside A and B; the biases behind B with their scale."""
    found = dict(adapter.replaced)
    for path, factors in adapter.factors.items():
        if factors.bias is not None:
            found[f"{path}: bias"] = factors.bias.double() * adapter.scale(path)
        if factors.magnitude is not None:
            found[f"{path}: magnitude"] = factors.magnitude
    return found
