"""An adapter for each row of a batch: gathered products, not a loop over adapters.

The batched form of S-LoRA (Sheng et al., arXiv:2311.03285) and Punica (Chen et al., arXiv:2310.18547), in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.errors import AdapterStateError
from loratune.lora.blocked import Blocked
from loratune.lora.equation import LowRank


class Bank(NamedTuple):
    """Several adapters of one layer, one above the other; ranks below the largest are filled up with zeros.

    Attributes:
        A: (adapters, r, in), B: (adapters, out, r), scale: (adapters,), bias: (adapters, out) or None.
    """

    A: Tensor
    B: Tensor
    scale: Tensor
    bias: Tensor | None


def bank_of(low_ranks: Sequence[LowRank | None], dtype: torch.dtype) -> Bank | None:
    """Adapters of one layer for computing in `dtype`; None stands for no update. None where nothing updates it."""
    assert all(low_rank is None or low_rank.magnitude is None for low_rank in low_ranks), "DoRA cannot be mixed"
    factors = [None if low_rank is None else low_rank.factors() for low_rank in low_ranks]
    there = [pair for pair in factors if pair is not None]
    if not there:
        return None
    r = max(A.shape[0] for A, _ in there)
    like, inner, outer = there[0][0], there[0][0].shape[1], there[0][1].shape[0]
    A_all = like.new_zeros(len(factors), r, inner, dtype=dtype)
    B_all = like.new_zeros(len(factors), outer, r, dtype=dtype)
    for i, pair in enumerate(factors):
        if pair is not None:
            A_all[i, : pair[0].shape[0]] = pair[0]
            B_all[i, :, : pair[0].shape[0]] = pair[1]
    scales = [0.0 if low_rank is None else low_rank.scale for low_rank in low_ranks]
    scale = torch.tensor(scales, dtype=torch.promote_types(dtype, torch.float32), device=like.device)
    bias = None
    if any(low_rank is not None and low_rank.bias is not None for low_rank in low_ranks):
        bias = like.new_zeros(len(factors), outer, dtype=dtype)
        for i, low_rank in enumerate(low_ranks):
            if low_rank is not None and low_rank.bias is not None:
                bias[i] = low_rank.bias * low_rank.scale
    return Bank(A_all, B_all, scale, bias)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which adapter each row of the batch has.

    Attributes:
        index: (rows,) positions in every bank.
        banks: the adapters of each layer that has some.
        names: the adapters' names by these positions; None is the base.
        tokens: of each row of the batch that goes through the model now, where known; some layers flatten the batch.
    """

    index: Tensor
    banks: Mapping[nn.Module, Bank]
    names: tuple[str | None, ...] = ()
    tokens: int | None = None

    def update(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """s · B A x of each row's own adapter for x (rows, …, in); None where no adapter is on this layer.

        Raises:
            AdapterStateError: x has another number of rows.
        """
        bank = self.banks.get(layer)
        if bank is None:
            return None
        index = self.index.to(x.device)
        by_row = self._by_row(x)
        A, B = bank.A.to(x.dtype)[index], bank.B.to(x.dtype)[index]
        h = torch.bmm(by_row, A.mT)
        # The scale is a factor in fp32: rounded to bf16 it would be up to 0.4 % off.
        h = (h * bank.scale[index][:, None, None]).to(h.dtype)
        y = torch.bmm(h, B.mT)
        if bank.bias is not None:
            y = y + bank.bias.to(y.dtype)[index][:, None]
        return y.view(*x.shape[:-1], y.shape[-1])

    def looked_up(self, layer: nn.Module, ids: Tensor) -> Tensor | None:
        """The same for ids (rows, …): A x is a column of A, x being its number."""
        bank = self.banks.get(layer)
        if bank is None:
            return None
        if len(ids) != len(self.index):
            raise AdapterStateError(
                f"{len(self.index)} rows have an adapter each, and an embedding was given {tuple(ids.shape)}",
                hint="give rows() one name for each row",
            )
        index = self.index.to(ids.device)
        adapters, r, number = bank.A.shape
        places = ids.reshape(len(ids), -1) + (index * number)[:, None]
        h = F.embedding(places, bank.A.transpose(1, 2).reshape(adapters * number, r))
        h = (h * bank.scale[index][:, None, None]).to(h.dtype)
        return torch.bmm(h, bank.B[index].mT).view(*ids.shape, -1)

    def _by_row(self, x: Tensor) -> Tensor:
        rows = len(self.index)
        # Two dimensions are tokens one after the other; some of them (an expert's) tell nothing of their rows.
        flattened = x.ndim == 2 and self.tokens is not None
        expected = rows * self.tokens if flattened and self.tokens is not None else rows
        if x.ndim < 2 or x.shape[0] != expected:
            raise AdapterStateError(
                f"{rows} rows have an adapter each, and a layer was given {tuple(x.shape)}",
                hint="give rows() one name for each row; a layer that sees some of the tokens only cannot be mixed",
            )
        tokens = self.tokens if flattened else math.prod(x.shape[1:-1])
        return x.reshape(rows, cast(int, tokens), x.shape[-1])


class Stack(NamedTuple):
    """Several adapters of one layer as one matrix each: every token meets all of them, and keeps its own part.

    For the few that stand beside each other in serving this is two plain products; gathering an adapter for each token
    would copy more than the products read.

    Attributes:
        A: (adapters · r, in). B: (out, adapters · r), the scale in it. bias: (adapters, out) or None.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, bank: Bank, dtype: torch.dtype) -> Stack:
        """Rounded once: the bank's dtype is fp32 at least."""
        B = (bank.B * bank.scale[:, None, None]).transpose(0, 1).flatten(1).to(dtype)
        return cls(bank.A.flatten(0, 1).to(dtype), B, None if bank.bias is None else bank.bias.to(dtype))

    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        # The product with zero is one of them exactly where a number is; one pass, and one answer.
        return not any(bool((t * 0).sum().isnan()) for t in (self.A, self.B, self.bias) if t is not None)

    def of_some(self, adapters: Tensor, count: int) -> Stack:
        """Those at these positions, of the `count` that there are."""
        A = self.A.unflatten(0, (count, -1)).index_select(0, adapters).flatten(0, 1)
        B = self.B.unflatten(1, (count, -1)).index_select(1, adapters).flatten(1)
        return Stack(A, B, None if self.bias is None else self.bias.index_select(0, adapters))


class _Beside(NamedTuple):
    """The stacks of layers that see the same x: all As below each other, each layer's columns of A x, and its B."""

    A: Blocked
    columns: tuple[int, ...]
    Bs: tuple[Blocked, ...]


class Stacks:
    """The stacks of each layer that has one, of the same adapters."""

    def __init__(self, by_layer: Mapping[nn.Module, Stack], adapters: int) -> None:
        self.by_layer, self.adapters = by_layer, adapters
        self._beside: dict[tuple[nn.Module, ...], _Beside] = {}

    def of_some(self, adapters: Sequence[int]) -> Stacks:
        """Those at these positions alone."""
        if not adapters:
            return Stacks({}, 0)
        some = {}
        for layer, stack in self.by_layer.items():
            some[layer] = stack.of_some(torch.tensor(adapters, device=stack.A.device), self.adapters)
        return Stacks(some, len(adapters))

    def beside(self, layers: tuple[nn.Module, ...]) -> _Beside:
        """Of layers that all have a stack; made when they first meet."""
        found = self._beside.get(layers)
        if found is None:
            stacks = [self.by_layer[layer] for layer in layers]
            columns = tuple(len(stack.A) for stack in stacks)
            A = Blocked(torch.cat([stack.A for stack in stacks]))
            found = self._beside[layers] = _Beside(A, columns, tuple(Blocked(stack.B) for stack in stacks))
        return found


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Which adapter each token of a pass has, whatever rows these stand in.

    Attributes:
        others: (tokens, adapters) bool, all but the token's own adapter; all of them for the base.
        stacks: the adapters of each layer that has some.
    """

    others: Tensor
    stacks: Stacks
    _wide: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def _hidden(self, r: int) -> Tensor:
        """(tokens, adapters · r) bool: what of A x belongs to the others."""
        if r not in self._wide:
            self._wide[r] = self.others.repeat_interleave(r, 1)
        return self._wide[r]

    def at(self, index: Tensor) -> TokenRows:
        """Of the tokens at `index` alone."""
        return TokenRows(self.others[index], self.stacks)

    def added(self, layers: Sequence[nn.Module], x: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
        """y + s · B A x with each token's own adapter, for what each of some layers gave for the same x (..., in).

        Raises:
            AdapterStateError: x has another number of tokens.
        """
        adapted = tuple(layer for layer in layers if layer in self.stacks.by_layer)
        if not adapted:
            return list(ys)
        tokens, adapters = self.others.shape
        if x.shape[:-1].numel() != tokens:
            raise AdapterStateError(
                f"{tokens} tokens have an adapter each, and a layer was given {tuple(x.shape)}",
                hint="a layer that sees some of the tokens only cannot be mixed",
            )
        beside = self.stacks.beside(adapted)
        parts = _parts(beside.A.times(x.reshape(tokens, -1)), beside.columns)
        found = dict(zip(layers, ys, strict=True))
        for layer, h, B in zip(adapted, parts, beside.Bs, strict=True):
            # What overflows in somebody else's adapter is left out, not multiplied by zero.
            h.masked_fill_(self._hidden(h.shape[1] // adapters), 0)
            y = B.added(found[layer].view(tokens, -1), h)
            bias = self.stacks.by_layer[layer].bias
            if bias is not None:
                y = y + (~self.others).to(y.dtype) @ bias.to(y.dtype)
            found[layer] = y.view(found[layer].shape)
        return list(found.values())


def _parts(h: Tensor, columns: tuple[int, ...]) -> Sequence[Tensor]:
    """h in so many columns each, every part in one piece, as the next product wants it."""
    if len(set(columns)) == 1:
        return h.view(len(h), len(columns), -1).transpose(0, 1).contiguous().unbind()
    return [part.contiguous() for part in h.split(columns, 1)]
