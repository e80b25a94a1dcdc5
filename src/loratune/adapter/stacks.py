"""Stacked experts in an adapter as a value: which tensors are theirs, and each expert as a layer of its own.

In a file nothing but the config says that tensors are a stack's, and nothing at all which of a module's parameters they
are for: that is told by the order of the parameters in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from loratune.adapter.value import Factors, SavedAdapter, Stack
from loratune.config import LoraConfig
from loratune.config.patterns import name_matches
from loratune.lora import apart, together_again

_INNER = ".base_layer"
# For whoever asks what a file alone does not tell.
KNOWN_BY_BASE = "attach it to its base, and take what saved() gives"


def with_stacks(factors: Mapping[str, Factors], config: LoraConfig) -> dict[str, Factors]:
    """The factors of a file, with those of parameters known as stacks, as far as the config tells."""
    owners: dict[str, list[str]] = {}
    for path in factors:
        owners.setdefault(_owner(path), []).append(path)
    found = dict(factors)
    for owner, paths in owners.items():
        names = _names_in(owner, config)
        # A name without a module's is in any; a target's tensors are not wrapped in another's.
        if not names or (all("." not in name for name in names) and _targeted(owner, config) and paths == [owner]):
            continue
        full = list(dict.fromkeys(f"{owner}.{name.rpartition('.')[2]}" for name in names))
        settings = {(config.rank_of(each), config.alpha_of(each)) for each in full}
        r, alpha = settings.pop() if len(settings) == 1 else (0, 0.0)
        for path in paths:
            rows = len(factors[path].A)
            experts = rows // r if r and rows % r == 0 else 0
            found[path] = factors[path]._replace(stack=Stack(experts, alpha, full[0] if len(full) == 1 else ""))
    return found


def _owner(path: str) -> str:
    while path.endswith(_INNER):
        path = path.removesuffix(_INNER)
    return path


def _names_in(owner: str, config: LoraConfig) -> list[str]:
    """Those of the config's parameters that may be this module's."""
    named = [(name, name.rpartition(".")[0]) for name in config.target_parameters or ()]
    return [name for name, module in named if not module or name_matches(module, owner)]


def _targeted(path: str, config: LoraConfig) -> bool:
    return isinstance(config.target_modules, tuple) and any(name_matches(name, path) for name in config.target_modules)


def stack_problems(adapters: Sequence[SavedAdapter], called: Sequence[str]) -> Iterator[str]:
    """Why the experts of these adapters cannot be looked at one by one, or not side by side."""
    for name, adapter in zip(called, adapters, strict=True):
        unclear = [path for path, factors in adapter.factors.items() if factors.stack and not factors.stack.experts]
        if unclear:
            yield f"{name}: only its base tells the ranks of {unclear[0]}, which the patterns of its config part"
    named = {name: adapter.config.target_parameters for name, adapter in zip(called, adapters, strict=True)}
    if len({frozenset(names or ()) for names in named.values()}) > 1:
        yield "they name other parameters, whose tensors stand under the same paths: " + "; ".join(
            f"{name} {', '.join(names or ()) or 'none'}" for name, names in named.items()
        )


def by_expert(adapter: SavedAdapter) -> SavedAdapter:
    """The adapter with each expert of a stack as a layer of its own, its number behind the path."""
    found: dict[str, Factors] = {}
    for path, factors in adapter.factors.items():
        if factors.stack is None:
            found[path] = factors
            continue
        one = factors.stack._replace(experts=1)
        pairs = zip(*apart(factors.A, factors.B, factors.stack.experts), strict=True)
        found |= {f"{path}.{number}": Factors(A, B, stack=one) for number, (A, B) in enumerate(pairs)}
    return replace(adapter, factors=found)


def stacked_again(factors: Mapping[str, Factors], like: Mapping[str, Factors]) -> dict[str, Factors]:
    """Experts that `by_expert` took apart in the place of the stacks in `like`, all of one rank, and of scale 1."""
    stacks = {path: each.stack for path, each in like.items() if each.stack is not None}
    found = {path: each for path, each in factors.items() if path in like}
    parts = {path: [factors[f"{path}.{number}"] for number in range(s.experts)] for path, s in stacks.items()}
    r = max((len(each.A) for some in parts.values() for each in some), default=0)
    for path, some in parts.items():
        A = torch.stack([F.pad(each.A, (0, 0, 0, r - len(each.A))) for each in some])
        B = torch.stack([F.pad(each.B, (0, r - len(each.A))) for each in some])
        A, B = together_again(A, B)
        found[path] = Factors(A.contiguous(), B.contiguous(), stack=stacks[path]._replace(alpha=float(r)))
    return dict(sorted(found.items()))
