"""Several adapters as one, from their factors alone: sums of weighted updates, exact or of a given rank.

The update of adapter i is ΔWᵢ = scaleᵢ · Bᵢ Aᵢ. Adding the factors themselves is not offered: (Σ wᵢBᵢ)(Σ wᵢAᵢ) has a
product of every adapter's B with every other's A, and is no weighted sum of updates.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from loratune.adapter.entries import agreed_mean, trimmed
from loratune.adapter.spectrum import decomposed
from loratune.adapter.stacks import KNOWN_BY_BASE, by_expert, stack_problems, stacked_again
from loratune.adapter.value import Factors, Origin, SavedAdapter
from loratune.config import NO_TARGETS, LoraConfig
from loratune.errors import AdapterFileError, ConfigError, nearest
from loratune.lora import generator_for
from loratune.lora.init import leading_directions

METHODS = ("concat", "svd", "ties", "dare")
_WITH_DENSITY = ("ties", "dare")
_LINEAR_NAMES = ("linear", "linear_svd")

# A matrix whose shorter side is longer than this is decomposed approximately.
_LARGEST_FULL_SVD = 1024
_OVERSAMPLING, _ROUNDS = 16, 6


@dataclass(frozen=True)
class Combined:
    """An adapter made of several.

    Attributes:
        adapter: its scale is 1 at every module, its tensors are fp32.
        errors: by module, ‖T − B A‖ / ‖T‖ (Frobenius) with T what the method asks for; 0 where B A is T, but for the
            rounding to fp32.
        error: the same over all modules together.
    """

    adapter: SavedAdapter
    method: str
    weights: tuple[float, ...]
    errors: Mapping[str, float]
    error: float


class _Term(NamedTuple):
    """One adapter's part of a module in fp64; its weight and scale are in B (out, r) and in the bias (out,)."""

    ordinal: int
    A: Tensor
    B: Tensor
    bias: Tensor | None


class _Sum(NamedTuple):
    """Factors of a module, with the norm of what was asked for and of what they miss of it."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    asked: float = 0.0
    missed: float = 0.0


@dataclass(frozen=True)
class _Entrywise:
    """TIES and DARE: rules for the entries of the updates, so each update is formed, one module at a time."""

    method: str
    density: float
    seed: int
    rank: int

    def __call__(self, path: str, terms: Sequence[_Term]) -> _Sum:
        shape = (terms[0].B.shape[0], terms[0].A.shape[1])
        mixed = self._mix(path, "weight", ((term.ordinal, term.B @ term.A) for term in terms), shape)
        k = min(self.rank, *mixed.shape)
        U, sigma, Vh = _leading(mixed, k, generator_for(self.seed, "subspace", path))
        A, B = _split(U, sigma, Vh, k)
        biases = [(term.ordinal, term.bias) for term in terms if term.bias is not None]
        bias = self._mix(path, "bias", biases, shape[:1]) if biases else None
        return _Sum(A, B, bias, float(mixed.norm()), float((mixed - B @ A).norm()))

    def _mix(self, path: str, role: str, updates: Iterable[tuple[int, Tensor]], shape: tuple[int, ...]) -> Tensor:
        if self.method == "ties":
            return agreed_mean((trimmed(update, self.density) for _, update in updates), shape)
        total = torch.zeros(shape, dtype=torch.float64)
        for ordinal, update in updates:
            drawn = torch.rand(shape, generator=generator_for(self.seed, ordinal, path, role), dtype=torch.float64)
            total += update * (drawn < self.density) / self.density
        return total


def combine(
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float],
    *,
    method: str = "concat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    names: Sequence[str] = (),
) -> Combined:
    """One adapter from several; a module that only some of them have is combined from those.

    - "concat": Σ wᵢΔWᵢ exactly, with rank Σ rᵢ.
    - "svd": the best approximation of that sum with at most `rank` (Eckart and Young, 1936), never formed densely.
    - "ties": of each wᵢΔWᵢ the `density` share of largest entries of the module is kept; of these, entry by entry, the
      mean of those with the sign of their sum (0 where they cancel). Yadav et al., arXiv:2306.01708, algorithm 1.
    - "dare": each entry of wᵢΔWᵢ is dropped with probability 1 − `density`, the others are divided by `density`; their
      sum. Yu et al., arXiv:2311.03099, section 3.1. The draw depends on seed, the adapter's place and the module.

    TIES and DARE are brought back to at most `rank` by the singular value decomposition, above 1024 rows and columns by
    seeded subspace iteration (Halko et al., arXiv:0909.4061, algorithm 4.4). A bias behind B is combined by the same
    rule, without loss.

    Args:
        weights: one for each adapter, of any sign.
        rank: for all methods but concat; the largest of the adapters' ranks where not given.
        density: for ties and dare, in (0, 1].
        names: what the adapters are called in errors.

    Raises:
        ConfigError: arguments that cannot be, every one of them.
        AdapterFileError: adapters that do not fit together, or whose update is not scale · B A alone; all reasons.
    """
    adapters, weights, names = _listed(adapters, weights, names)
    called = [names[i] if i < len(names) else f"adapter {i + 1}" for i in range(len(adapters))]
    _refuse(adapters, weights, method, rank, density, seed, called)
    stacked = {path: factors for adapter in adapters for path, factors in adapter.factors.items()}
    adapters = [by_expert(adapter) for adapter in adapters]
    k = rank or max(factors.A.shape[0] for adapter in adapters for factors in adapter.factors.values())
    entrywise = _Entrywise(method, density, seed, k) if density is not None else None
    sums: dict[str, _Sum] = {}
    for path in sorted({path for adapter in adapters for path in adapter.factors}):
        terms = [_term(i, adapters[i], weights[i], path) for i in range(len(adapters)) if path in adapters[i].factors]
        if entrywise is not None:
            sums[path] = entrywise(path, terms)
        else:
            sums[path] = _concatenated(terms) if method == "concat" else _truncated(terms, k)
    asked, missed = (math.hypot(*(getattr(each, name) for each in sums.values())) for name in ("asked", "missed"))
    return Combined(
        adapter=_adapter(adapters, sums, stacked),
        method=method,
        weights=tuple(float(weight) for weight in weights),
        errors={path: each.missed / each.asked if each.asked else 0.0 for path, each in sums.items()},
        error=missed / asked if asked else 0.0,
    )


# -- refusals ----------------------------------------------------------------------------------------------------


def _refuse(
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float | None,
    seed: int,
    called: Sequence[str],
) -> None:
    problems: list[tuple[str, str]] = []
    if method in _LINEAR_NAMES:
        why = "it adds up A and B apart, and the product of the sums is not a weighted sum of the updates"
        problems.append((f"method={method!r} is not offered: {why}", "concat is the exact sum, svd its best of a rank"))
    elif method not in METHODS:
        problems.append((f"no method {method!r}{nearest(str(method), METHODS)}", f"there are {', '.join(METHODS)}"))
    if not adapters:
        problems.append(("there is no adapter to combine", "name at least one"))
    if len(weights) != len(adapters):
        problems.append((f"{len(weights)} weights for {len(adapters)} adapters", "give one weight for each adapter"))
    problems += [
        (f"weight {number} is {weight!r}, not a finite number", "")
        for number, weight in enumerate(weights, start=1)
        if not _is_number(weight)
    ]
    problems += _unset(method, rank, density, seed)
    misfits = _misfits(adapters, called)
    if not problems and not misfits:
        problems = _overflows(adapters, weights, called)
    if problems or misfits:
        kind = ConfigError if problems else AdapterFileError
        hints = dict.fromkeys(hint for _, hint in (*problems, *misfits) if hint)
        raise kind([problem for problem, _ in (*problems, *misfits)], hint="; ".join(hints))


def _unset(method: str, rank: int | None, density: float | None, seed: int) -> list[tuple[str, str]]:
    """Settings of the methods that are wrong, or missing."""
    problems = []
    if rank is not None and not _is_rank(rank):
        problems.append((f"rank={rank!r} is no whole number from 1", ""))
    elif rank is not None and method == "concat":
        problems.append((f"rank={rank} with concat, whose rank is the sum of all", "method svd keeps to a rank"))
    if not _is_whole(seed):
        problems.append((f"seed={seed!r} is no whole number", "give a seed such as 0"))
    if density is not None and not (_is_number(density) and 0 < density <= 1):
        problems.append((f"density={density!r} is not in (0, 1]", ""))
    elif density is not None and method in ("concat", "svd"):
        problems.append((f"density={density} means nothing to {method}", "leave density out, or take ties or dare"))
    elif density is None and method in _WITH_DENSITY:
        papers = "the papers keep 0.2 (ties) and 0.1 (dare); a rank that small entries do not fit wants more"
        problems.append((f"{method} needs a density", papers))
    return problems


def _listed(*given: object) -> list[list[Any]]:
    """`adapters`, `weights` and `names` as lists, in the order in which they were given."""
    problems: list[str] = []
    lists: list[list[Any]] = []
    for word, value in zip(("adapters", "weights", "names"), given, strict=True):
        is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes | Set | Mapping)
        lists.append(list(cast("Iterable[Any]", value)) if is_list else [])
        problems += [] if is_list else [f"{word} is a {type(value).__name__}, not a list"]
    kinds = [(i, type(item).__name__) for i, item in enumerate(lists[0], 1) if not isinstance(item, SavedAdapter)]
    problems += [f"adapter {i} is a {kind}, not a SavedAdapter" for i, kind in kinds]
    if problems:
        raise ConfigError(problems, hint="give a list of adapters, each from read_adapter(folder), and one of numbers")
    return lists


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return _is_whole(value) and value >= 1


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _misfits(adapters: Sequence[SavedAdapter], called: Sequence[str]) -> list[tuple[str, str]]:
    """Why these adapters cannot be combined, each with what to do about it."""
    found = []
    for name, adapter in zip(called, adapters, strict=True):
        if not adapter.factors:
            found.append((f"{name} holds no low-rank tensors{adapter.instead}", ""))
        dora = [path for path, factors in adapter.factors.items() if factors.magnitude is not None]
        if dora:
            why = f"{name} is a DoRA adapter ({len(dora)} modules): its update is not scale · B A alone"
            found.append((why, "merge a DoRA adapter into its base instead"))
        if adapter.replaced:
            why = f"{name} replaces tensors of the base ({_some(adapter.replaced)}), which do not add up"
            found.append((why, "train without modules_to_save and with bias none"))
        if adapter.config.decomposes:
            why = f"{name} starts from {adapter.config.init_lora_weights!r}: its update is relative to a changed base"
            found.append((why, "attach it to its base and save it, which writes a plain adapter"))
        grouped = [path for path, factors in adapter.factors.items() if factors.groups > 1]
        if grouped:
            why = f"{name}: {grouped[0]} is a convolution with groups, whose B has blocks that a sum would fill"
            found.append((why, "leave convolutions with groups out of adapters that are to be combined"))
        bad = [tensor_name for tensor_name, tensor in adapter.named_tensors() if not tensor.isfinite().all()]
        found += [(f"{name}: {tensor_name} holds NaN or infinity", "") for tensor_name in bad]
    found += _unlike(adapters, called)
    found += [(why, KNOWN_BY_BASE) for why in stack_problems(adapters, called)]
    return found


def _unlike(adapters: Sequence[SavedAdapter], called: Sequence[str]) -> list[tuple[str, str]]:
    """Signs that the adapters were not trained on one base."""
    hint = "combine adapters of one base"
    found = []
    bases = {name: adapter.origin.base for name, adapter in zip(called, adapters, strict=True) if adapter.origin.base}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{name} on {base[:12]}" for name, base in bases.items())
        found.append((f"trained on bases with other weights: {listed}", hint))
    shapes: dict[str, dict[str, str]] = {}
    for name, adapter in zip(called, adapters, strict=True):
        for path, factors in adapter.factors.items():
            shapes.setdefault(path, {})[name] = factors.shown + (" of an embedding" if factors.looked_up else "")
    for path, of in sorted(shapes.items()):
        if len(set(of.values())) > 1:
            found.append((f"{path}: " + ", ".join(f"{shape} in {name}" for name, shape in of.items()), hint))
    return found


def _overflows(
    adapters: Sequence[SavedAdapter], weights: Sequence[float], called: Sequence[str]
) -> list[tuple[str, str]]:
    limit = torch.finfo(torch.float32).max
    return [
        (f"weight {weight:g} takes {name}: {path} beyond the numbers of fp32", "lower the weight")
        for name, adapter, weight in zip(called, adapters, weights, strict=True)
        for path, factors in adapter.factors.items()
        for tensor in (factors.B, factors.bias)
        if tensor is not None and float(tensor.double().abs().max()) * abs(weight * adapter.scale(path)) > limit
    ]


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


# -- one module --------------------------------------------------------------------------------------------------


def _term(ordinal: int, adapter: SavedAdapter, weight: float, path: str) -> _Term:
    factors = adapter.factors[path]
    A, B = (factor.detach().cpu().double() for factor in factors.matrices())
    bias = None if factors.bias is None else factors.bias.detach().cpu().double()
    factor = float(weight) * adapter.scale(path)
    return _Term(ordinal, A, B * factor, None if bias is None else bias * factor)


def _concatenated(terms: Sequence[_Term]) -> _Sum:
    biases = [term.bias for term in terms if term.bias is not None]
    return _Sum(
        A=torch.cat([term.A for term in terms]),
        B=torch.cat([term.B for term in terms], dim=1),
        bias=torch.stack(biases).sum(dim=0) if biases else None,
    )


def _truncated(terms: Sequence[_Term], rank: int) -> _Sum:
    A, B, bias, *_ = _concatenated(terms)
    U, sigma, Vh = decomposed(A, B)
    k = min(rank, len(sigma))
    return _Sum(*_split(U, sigma, Vh, k), bias, float(sigma.norm()), float(sigma[k:].norm()))


def _split(U: Tensor, sigma: Tensor, Vh: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k) with the product U Σ Vᵀ of the k leading directions, of equal size."""
    root = sigma[:k].sqrt()
    return root[:, None] * Vh[:k], U[:, :k] * root


def _leading(matrix: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular directions of a dense (out, in) matrix: U (out, ≥ k), σ, Vᵀ (≥ k, in)."""
    if min(matrix.shape) <= _LARGEST_FULL_SVD:
        U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U, sigma, Vh
    return leading_directions(matrix, k + _OVERSAMPLING, rounds=_ROUNDS, generator=generator)


# -- the result --------------------------------------------------------------------------------------------------


def _adapter(
    adapters: Sequence[SavedAdapter], sums: Mapping[str, _Sum], stacked: Mapping[str, Factors]
) -> SavedAdapter:
    has_bias = any(each.bias is not None for each in sums.values())
    factors = {}
    for path, (A, B, bias, *_) in sums.items():
        # A file has a bias behind every B or behind none.
        behind = torch.zeros(B.shape[0]) if bias is None and has_bias else bias
        like = next(adapter.factors[path] for adapter in adapters if path in adapter.factors)
        factors[path] = like.of_matrices(A.float(), B.float(), None if behind is None else behind.float())
    factors = stacked_again(factors, stacked)
    ranks = {path: len(each.A) for path, each in factors.items() if each.stack is None}
    parameters = adapters[0].config.target_parameters
    in_stacks = next((len(each.A) // each.stack.experts for each in factors.values() if each.stack), None)
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else in_stacks
    assert r is not None, "an adapter without factors was refused"
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    if in_stacks is not None and in_stacks != r:
        others |= {re.escape(name): in_stacks for name in parameters or ()}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=tuple(ranks) or NO_TARGETS,
        target_parameters=parameters,
        rank_pattern=others,
        alpha_pattern={key: float(rank) for key, rank in others.items()},
        lora_bias=has_bias,
        fan_in_fan_out=any(adapter.config.fan_in_fan_out for adapter in adapters),
        task_type=_agreed([adapter.config.task_type for adapter in adapters]),
    )
    return SavedAdapter(
        config,
        factors,
        base=_agreed([adapter.base for adapter in adapters]),
        revision=_agreed([adapter.revision for adapter in adapters]),
        origin=Origin(*(_agreed([getattr(a.origin, name) for a in adapters]) for name in Origin.__dataclass_fields__)),
    )


def _agreed(values: Sequence[Any]) -> Any:
    """What all say, or None."""
    return values[0] if all(value == values[0] for value in values) else None
