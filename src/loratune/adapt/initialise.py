"""Starts that are made from data: passes through the base show what each target is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.adapt.entry import Entry
from loratune.adapt.placement import Placement
from loratune.adapt.target import Target
from loratune.config import LoraConfig
from loratune.errors import AdapterStateError
from loratune.lora import Directions, LoraLayer, LowRank, Seen, eva_factors, ranks_by_explained, scale_of

Forward = Callable[[Any], Any]
# How many inputs are remembered to see who shares them.
_REMEMBERED = 4
# The label of tokens that are not scored.
_UNSCORED = -100
# Which vectors of a batch count: bool, of the shape of its tokens; None where all do.
Counts = Callable[[Any], Tensor | None]


def directions_of_inputs(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    width: int,
    batches: Iterable[Any],
    forward: Forward,
    counts: Counts,
) -> dict[str, Directions]:
    """What the layers are given in passes over the batches, layers that are always given the same looking once.

    Raises:
        AdapterStateError: no batches, or a layer that no batch reaches.
    """
    from loratune.model.modes import evaluating  # with transformers, which attaching does without

    gathering = _Gathering(width)
    with torch.no_grad(), evaluating(model), gathering.listening(layers):
        for batch in batches:
            gathering.begin(counts(batch))
            forward(batch)
    found = {path: seen.directions() for path, seen in gathering.seen.items()}
    unseen = [path for path in layers if path not in gathering.leader or not len(found[gathering.leader[path]].rows)]
    if unseen:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise AdapterStateError(
            f"no batch gives {unseen[0]}{more} anything but zeros", hint="give batches as the model is trained on"
        )
    return {path: found[gathering.leader[path]] for path in layers}


class _Gathering:
    """`leader`: of each layer the first one that is given the same tensors, which looks for all of them."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.seen: dict[str, Seen] = {}
        self.leader: dict[str, str] = {}
        self._given: list[tuple[Tensor, str]] = []
        self._counting: Tensor | None = None

    def begin(self, counting: Tensor | None) -> None:
        self._given, self._counting = [], counting

    @contextmanager
    def listening(self, layers: Mapping[str, LoraLayer]) -> Iterator[None]:
        hooks = [layer.register_forward_pre_hook(self._hook(path), with_kwargs=True) for path, layer in layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            first = next((leader for tensor, leader in self._given if tensor is x), path)
            if first == path:
                # Layers that share an input follow each other; older ones would hold the whole pass in memory.
                self._given = [*self._given[-_REMEMBERED:], (x, path)]
            leader = self.leader.setdefault(path, first)
            if leader not in (first, path):
                # They parted: from here on it would see what its leader has not.
                raise AdapterStateError(
                    f"{path} is given what {leader} is given in some batches only",
                    hint="init='eva' needs a model whose layers are called alike in every pass",
                )
            if leader == path:
                vectors = self._counted(x)
                if not bool(vectors.isfinite().all()):
                    raise AdapterStateError(f"{path} is given NaN or infinity", hint="look at the base, or its dtype")
                self.seen.setdefault(path, Seen(self.width)).add(vectors)

        return look

    def _counted(self, x: Tensor) -> Tensor:
        vectors = x.reshape(-1, x.shape[-1])
        mask = self._counting
        # A layer that sees some of the tokens only (an expert) tells nothing of which these are.
        return vectors if mask is None or mask.numel() != len(vectors) else vectors[mask.flatten().to(x.device)]


def from_data(
    entry: Entry, name: str, placement: Placement, batches: Iterable[Any], forward: Forward | None, counts: Counts
) -> Entry:
    """Give an adapter its start, and say what it is now: ranks follow what the directions explain, scales stay.

    Raises:
        AdapterStateError: another init, or it has been trained or started already; no batches; nothing is changed.
    """
    low_ranks = {path: cast(LowRank, term) for path, term in placement.terms(name).items()}
    if not entry.waits:
        raise AdapterStateError(f"{name!r} needs no data to start from", hint="only init='eva' does, and once")
    if any(bool(low_rank.B.any()) for low_rank in low_ranks.values()):
        raise AdapterStateError(f"{name!r} has been trained already", hint="initialise before the first step")
    # One for all: who looks for others must see as many directions as any of them may want.
    width = max(int(target.r * entry.config.eva_rho) for target in entry.plan.targets)
    layers = {path: placement.layers[path] for path in low_ranks}
    model = placement.model
    found = directions_of_inputs(model, layers, width, batches, forward or forward_of(model), counts)
    ranks = ranks_by_explained(
        {target.path: target.r for target in entry.plan.targets},
        {path: directions.explained for path, directions in found.items()},
        entry.config.eva_rho,
    )
    targets = tuple(replace(target, r=ranks[target.path]) for target in entry.plan.targets)
    for target in targets:
        _put(low_ranks[target.path], eva_factors(found[target.path], target.r, target.out_features))
    changed = [target for target, before in zip(targets, entry.plan.targets, strict=True) if target.r != before.r]
    config = _with_ranks(entry.config, changed)
    notes = [
        f"{target.path}: rank {target.r} → {len(found[target.path].rows)}: what it is given spans no more"
        for target in entry.plan.targets
        if len(found[target.path].rows) < target.r
    ]
    plan = replace(entry.plan, targets=targets, notes=(*entry.plan.notes, *notes))
    return replace(entry, config=config, plan=plan, waits=False)


def _with_ranks(config: LoraConfig, targets: Sequence[Target]) -> LoraConfig:
    """The config in which these targets have their ranks and scales, before any pattern of the user's."""
    ranks, alphas = {}, {}
    for target in targets:
        pattern = f"^{re.escape(target.path)}"
        ranks[pattern] = target.r
        alphas[pattern] = target.scale / scale_of(target.r, 1.0, config.use_rslora)
    changes = {"rank_pattern": {**ranks, **config.rank_pattern}, "alpha_pattern": {**alphas, **config.alpha_pattern}}
    return cast(LoraConfig, config.replace(**changes))


def _put(low_rank: LowRank, factors: tuple[Tensor, Tensor]) -> None:
    for own, value in zip((low_rank.A, low_rank.B), factors, strict=True):
        own.data = value.to(own.device, own.dtype)


def forward_of(model: nn.Module) -> Forward:
    """A batch as the model's arguments: a mapping by name, a tuple or list by place, anything else as the only one."""

    def forward(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)

    return forward


def real_tokens(batch: Any) -> Tensor | None:
    """Those that are there by the batch's attention mask and, where it has labels of tokens, are scored."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if not isinstance(labels, Tensor) or labels.ndim != 2 or (real is not None and real.shape != labels.shape):
        return real
    scored = labels != _UNSCORED
    return scored if real is None else real & scored
