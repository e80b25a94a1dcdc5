"""An adapter for each row of a batch: the adapters in use, one above the other, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.adapt.entry import Entry
from loratune.adapt.placement import Placement, weight_of
from loratune.config.methods import IA3
from loratune.errors import AdapterStateError
from loratune.lora import AdapterState, Bank, LoraLayer, LowRank, Rows, Stack, Stacks, TokenRows, bank_of

# Passes after which a set of adapters has narrower stacks, and how many sets keep theirs.
_WHILE, _KEPT = 4, 2


def rows_of(placement: Placement, names: Sequence[str | None]) -> Rows:
    """The adapter of each row by its name; None is the base. The tensors are copied as they are now."""
    distinct = (None, *sorted({name for name in names if name is not None}))
    return Rows(torch.tensor([distinct.index(name) for name in names]), dict(_banks(placement, distinct)), distinct)


class Mixed:
    """Some adapters, ready for passes in which each token has its own; their tensors are copied as they are now."""

    def __init__(self, placement: Placement, names: Sequence[str]) -> None:
        """Raises AdapterStateError where a tensor is not finite: it would reach the tokens of all the others."""
        self.names = tuple(names)
        self._state = placement.state
        stacks = _stacks(placement, self.names)
        if not all(stack.is_finite() for stack in stacks.values()):
            _refuse_broken(placement, names)
        self._stacks = Stacks(stacks, len(self.names))
        self._some: dict[tuple[int, ...], Stacks] = {}
        self._seen: dict[tuple[int, ...], int] = {}

    @contextmanager
    def passing(self, names: Sequence[str | None], counts: Sequence[int], device: torch.device) -> Iterator[None]:
        """Inside the block a pass has `counts` tokens with the adapter of each name; None is the base."""
        places = [None if name is None else self.names.index(name) for name in names]
        present = sorted({place for place in places if place is not None})
        stacks = self._stacks
        few = len(present) <= len(self.names) // 2  # the others are computed for nothing
        narrowed = self._narrowed(tuple(present)) if few else None
        if narrowed is not None:
            stacks = narrowed
            places = [None if place is None else present.index(place) for place in places]
        others = torch.ones(len(names), stacks.adapters, dtype=torch.bool)
        for row, place in enumerate(places):
            if place is not None:
                others[row, place] = False
        others = others.repeat_interleave(torch.tensor(counts), 0)
        with self._state.suspending(self.names, active=(), rows=TokenRows(others.to(device), stacks)):
            yield

    def _narrowed(self, present: tuple[int, ...]) -> Stacks | None:
        """The stacks of some adapters, once they have been together for a while: making them takes longer than a pass.

        They stay together for many passes, and then never meet again.
        """
        if not present:
            return Stacks({}, 0)
        self._seen = {present: self._seen.get(present, 0) + 1}
        found = self._some.pop(present, None)
        if found is None and self._seen[present] >= _WHILE:
            found = self._stacks.of_some(present)
        if found is not None:
            self._some[present] = found
            if len(self._some) > _KEPT:
                del self._some[next(iter(self._some))]
        return found


def _refuse_broken(placement: Placement, names: Sequence[str]) -> None:
    """Raise for those of some adapters that hold what is not finite."""
    paths: dict[nn.Module, str] = {layer: path for path, layer in placement.layers.items()}
    broken = [
        # What is finite in fp32 may not be in fp16.
        f"{name!r} holds NaN or infinity: {paths[layer]}, in {str(weight_of(layer).dtype).removeprefix('torch.')}"
        for name in names
        for layer, stack in _stacks(placement, (name,)).items()
        if not stack.is_finite()
    ]
    raise AdapterStateError(broken, hint="remove it, or load a sound one in its place")


def _stacks(placement: Placement, names: Sequence[str]) -> dict[nn.Module, Stack]:
    fine = _banks(placement, names, at_least=torch.float32)
    return {layer: Stack.of(bank, weight_of(layer).dtype) for layer, bank in fine}


@torch.no_grad()
def _banks(
    placement: Placement, names: Sequence[str | None], *, at_least: torch.dtype | None = None
) -> Iterator[tuple[LoraLayer, Bank]]:
    """The adapters of each layer that has some, in its weight's dtype or a finer one."""
    for layer in placement.layers.values():
        own = weight_of(layer).dtype
        held = layer.lora._modules
        low_ranks = [None if name is None else cast("LowRank | None", held.get(name)) for name in names]
        bank = bank_of(low_ranks, own if at_least is None else torch.promote_types(own, at_least))
        if bank is not None:
            yield layer, bank


def names_of_rows(names: object) -> tuple[str | None, ...]:
    """`names`, if it is a list of names, or None, in the order of the rows."""
    problems = []
    listed: tuple[Any, ...] = ()
    if isinstance(names, str | bytes | Set | Mapping) or not isinstance(names, Iterable):
        problems.append(f"rows() was given a {type(names).__name__}, not a list of names")
    else:
        listed = tuple(names)
    problems += [
        f"row {number} has a {type(name).__name__}, not a name"
        for number, name in enumerate(listed, start=1)
        if not isinstance(name, str | None)
    ]
    if problems:
        raise AdapterStateError(problems, hint="give a list with one name, or None for the base, for each row")
    return listed


def check_mixed(model: nn.Module, used: Mapping[str, Entry], kinds: int, *, by_token: bool = False) -> None:
    """Raise unless rows with these adapters, and `kinds` with the base's, can stand in one batch.

    Args:
        by_token: each token is to have its own, wherever it stands.
    """
    problems = []
    if not kinds:
        problems.append("rows() needs a name, or None, for each row of the batch")
    if model.training:
        problems.append("rows() is for inference, and the model is in training mode")
    for name, entry in used.items() if kinds > 1 else ():
        if entry.config.use_dora:
            problems.append(f"{name!r} is a DoRA adapter, which cannot share a batch with others")
        if entry.config.peft_type == IA3:
            problems.append(f"{name!r} is an (IA)³ adapter, which cannot share a batch with others")
        own = entry.plan.replaced if by_token else entry.plan.whole
        if own:
            problems.append(f"{name!r} has its own {next(own[0].full_names())}, for all rows")
        unmixed = [
            t
            for t in entry.plan.targets
            if t.form.use in ("convolution", "stack") or (by_token and t.form.use == "lookup")
        ]
        problems += [f"{name!r} is on {t.path} ({t.kind}), which cannot be mixed" for t in unmixed[:1]]
    if problems:
        raise AdapterStateError(problems, hint="call model.eval(), and activate() one such adapter at a time")


@contextmanager
def expecting(model: nn.Module, state: AdapterState) -> Iterator[None]:
    """Inside the block the model refuses a batch of another number of rows than the state's view says."""

    def look(asked: nn.Module, args: Any, kwargs: Any) -> None:
        if asked is not model:  # a copy made inside the block has this hook too, and no block
            return
        view = state.view
        # Of the innermost block, which may be another one than that which set this hook.
        tokens = None if view.batch is None else _tokens_of(model, args, kwargs, view.batch)
        if isinstance(view.rows, Rows):
            state.change(rows=replace(view.rows, tokens=tokens))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _tokens_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], rows: int) -> int | None:
    """Tokens of each row of the batch that enters the model, after seeing that it has `rows` rows.

    Raises:
        AdapterStateError: it has another number of rows, or the model trains.
    """
    if model.training:
        raise AdapterStateError("rows() is for inference, and the model is in training mode", hint="call model.eval()")
    named = [kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs]
    entering = next((value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if entering is None or entering.ndim == 0:
        return None
    if len(entering) != rows:
        raise AdapterStateError(
            f"rows() has {rows} names, and the batch has {len(entering)} rows",
            hint="give one name, or None for the base, for each row",
        )
    return entering.shape[1] if entering.ndim > 1 else None
