"""Starts that are made from data: passes through the base show what each target is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.adapt.plan import Target, TargetPlan
from loratune.config import LoraConfig
from loratune.errors import AdapterStateError
from loratune.lora import Directions, LoraLayer, LowRank, Seen, eva_factors, ranks_by_explained, scale_of

Forward = Callable[[Any], Any]
# Which vectors of a batch count: bool, of the shape of its tokens; None where all do.
Counts = Callable[[Any], Tensor | None]


def directions_of_inputs(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    widths: Mapping[str, int],
    batches: Iterable[Any],
    forward: Forward,
    counts: Counts,
) -> dict[str, Directions]:
    """What the layers are given in passes over the batches, layers that are always given the same looking once.

    Raises:
        AdapterStateError: no batches, or a layer that no batch reaches.
    """
    from loratune.model.modes import evaluating  # with transformers, which attaching does without

    gathering = _Gathering(widths)
    with torch.no_grad(), evaluating(model), gathering.listening(layers):
        for batch in batches:
            gathering.begin(counts(batch))
            forward(batch)
    unseen = [path for path in layers if path not in gathering.leader]
    if unseen:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise AdapterStateError(f"no batch reaches {unseen[0]}{more}", hint="give batches as the model is trained on")
    found = {path: seen.directions() for path, seen in gathering.seen.items()}
    return {path: found[gathering.leader[path]] for path in layers}


class _Gathering:
    """`leader`: of each layer the first one that is given the same tensors, which looks for all of them."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.widths = widths
        self.seen: dict[str, Seen] = {}
        self.leader: dict[str, str] = {}
        self._given: list[tuple[Tensor, str]] = []
        self._counting: Tensor | None = None

    def begin(self, counting: Tensor | None) -> None:
        self._given, self._counting = [], counting

    @contextmanager
    def listening(self, layers: Mapping[str, LoraLayer]) -> Iterator[None]:
        hooks = [layer.register_forward_pre_hook(self._hook(path)) for path, layer in layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            first = next((leader for tensor, leader in self._given if tensor is x), path)
            if first == path:
                self._given.append((x, path))
            leader = self.leader.setdefault(path, first)
            if leader not in (first, path):
                # They parted: from here on it would see what its leader has not.
                raise AdapterStateError(
                    f"{path} is given what {leader} is given in some batches only",
                    hint="init='eva' needs a model whose layers are called alike in every pass",
                )
            if leader == path:
                width = max(self.widths[path], 1)
                self.seen.setdefault(path, Seen(width)).add(self._counted(x))

        return look

    def _counted(self, x: Tensor) -> Tensor:
        vectors = x.reshape(-1, x.shape[-1])
        mask = self._counting
        # A layer that sees some of the tokens only (an expert) tells nothing of which these are.
        return vectors if mask is None or mask.numel() != len(vectors) else vectors[mask.flatten().to(x.device)]


def eva_start(
    config: LoraConfig, plan: TargetPlan, found: Mapping[str, Directions]
) -> tuple[LoraConfig, TargetPlan, dict[str, tuple[Tensor, Tensor]]]:
    """The config and the plan with the ranks that the directions ask for, and A and B by path.

    Scales stay what they were, so that alphas move with the ranks.
    """
    ranks = ranks_by_explained(
        {target.path: target.r for target in plan.targets},
        {path: directions.explained for path, directions in found.items()},
        config.eva_rho,
    )
    targets = tuple(replace(target, r=ranks[target.path]) for target in plan.targets)
    factors = {target.path: eva_factors(found[target.path], target.r, target.out_features) for target in targets}
    changed = [target for target, before in zip(targets, plan.targets, strict=True) if target.r != before.r]
    return _with_ranks(config, changed), replace(plan, targets=targets), factors


def _with_ranks(config: LoraConfig, targets: Sequence[Target]) -> LoraConfig:
    """The config in which these targets have their ranks and scales, before any pattern of the user's."""
    ranks, alphas = {}, {}
    for target in targets:
        pattern = f"^{re.escape(target.path)}"
        ranks[pattern] = target.r
        alphas[pattern] = target.scale / scale_of(target.r, 1.0, config.use_rslora)
    changes = {"rank_pattern": {**ranks, **config.rank_pattern}, "alpha_pattern": {**alphas, **config.alpha_pattern}}
    return cast(LoraConfig, config.replace(**changes))


def put_start(low_rank: LowRank, A: Tensor, B: Tensor) -> None:
    """Let the adapter's factors be these, in their own dtype and on their own device."""
    for name, value in (("A", A), ("B", B)):
        own = cast(nn.Parameter, getattr(low_rank, name))
        own.data = value.to(own.device, own.dtype)


def forward_of(model: nn.Module) -> Forward:
    """A batch as the model's arguments: a mapping by name, a tuple or list by place, anything else as the only one."""

    def forward(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)

    return forward


def real_tokens(batch: Any) -> Tensor | None:
    """Those that the batch's own attention mask says are there."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
