"""Rows of a table that an adapter has its own of: those of a few tokens, where all the others stay the base's.

The table is not copied for a pass. What an embedding gives for such a token is exchanged in its output, and to what a
head that shares the table gives for it, a column of the logits, what the row has moved by is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.errors import AdapterStateError
from loratune.lora.lookup import factor_of_rows
from loratune.lora.replaced import in_place_of
from loratune.lora.rows import Rows, TokenRows
from loratune.lora.state import AdapterState
from loratune.lora.swap import Adapting, leave, put_on, wears


class OwnRows(nn.Module):
    """One adapter's own rows of a table.

    Attributes:
        rows: (n, features), in the order in which the tokens were named.
        numbers: (n,), which rows of the table they are, ascending. places: (n,), where each of these stands in `rows`.
    """

    rows: nn.Parameter
    numbers: Tensor
    places: Tensor

    def __init__(self, rows: Tensor, tokens: Sequence[int]) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        numbers, places = torch.tensor(tokens, device=rows.device).sort()
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("places", places, persistent=False)

    def put_into(self, table: Tensor) -> Tensor:
        """A copy of the table (number, features) with these rows in it, in the table's dtype."""
        return table.index_copy(0, self.numbers, self.rows[self.places].to(table.dtype))

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        if f"{prefix}rows" in state_dict:  # a checkpoint of the base alone has none
            super()._load_from_state_dict(state_dict, prefix, *rest)


class Retraining(Adapting):
    """Mixed in where some adapter has rows of its own: an embedding, and linear layers that share its table."""

    order = -1
    holder = "lora_rows"
    lora_rows: nn.ModuleDict

    @property
    def weight(self) -> Tensor:
        """For whoever reads the table himself; what is adapted stands in a copy."""
        table = cast(Tensor, in_place_of(self, "weight"))
        for own in self._present():
            table = own.put_into(table)
        return table

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        present, rows = self._present(), self.lora_state.view.rows
        if rows is not None:
            y: Tensor = super().forward(input, *args, **kwargs)
            return self._exchanged_by_row(input, y, rows)
        if not present:
            return cast(Tensor, super().forward(input, *args, **kwargs))
        y = self._of_table(input)
        for own in present:
            y = self._exchanged(input, y, own)
        return y

    def _present(self) -> list[OwnRows]:
        held = self.lora_rows._modules
        return [cast(OwnRows, held[name]) for name in self.lora_state.view.active if name in held]

    def _of_table(self, x: Tensor) -> Tensor:
        """What the module computes with the base's table, past the property above."""
        table, module = cast(Tensor, self._parameters["weight"]), cast(Any, self)
        if isinstance(module, nn.Embedding):
            return F.embedding(x, table) * factor_of_rows(module)
        return F.linear(x, table, module.bias)

    def _exchanged(self, x: Tensor, y: Tensor, own: OwnRows) -> Tensor:
        """The output for x with this adapter's rows; y may be written over."""
        module = cast(Any, self)
        if not isinstance(module, nn.Embedding):
            # What the rows have changed by: nothing at the start, when the logits are the base's bit for bit.
            moved = own.rows[own.places] - module._parameters["weight"][own.numbers]
            return y.index_add_(-1, own.numbers, F.linear(x, moved.to(x.dtype)).to(y.dtype))
        near = torch.searchsorted(own.numbers, x).clamp_max(len(own.numbers) - 1)
        found = own.numbers[near] == x
        rows = own.rows[own.places[near]]
        if module.padding_idx is not None:
            rows = rows.where((x != module.padding_idx)[..., None], rows.detach())  # as its table's gets no gradient
        return torch.where(found[..., None], rows.to(y.dtype) * factor_of_rows(module), y)

    def _exchanged_by_row(self, x: Tensor, y: Tensor, rows: Rows | TokenRows) -> Tensor:
        if not isinstance(rows, Rows) or len(x) != len(rows.index):
            raise AdapterStateError(
                f"an adapter with rows of its own was given {tuple(x.shape)}, which are not the rows of a batch",
                hint="activate() one such adapter at a time, or rows() for a whole batch",
            )
        index = rows.index.to(x.device)
        for place, name in enumerate(rows.names):
            if name is not None and name in self.lora_rows:
                its = (index == place).nonzero().flatten()
                y = y.index_copy(0, its, self._exchanged(x[its], y[its], cast(OwnRows, self.lora_rows[name])))
        return y


def retrain_in(module: nn.Module, state: AdapterState, adapter: str, own: OwnRows) -> None:
    """Let `adapter` have its own of some rows of the module's table; modules that share it are given the same ones."""
    if not wears(module, Retraining.order):
        module.lora_rows = nn.ModuleDict()
        cast(Adapting, module).lora_state = state
        put_on(module, Retraining)
    cast(nn.ModuleDict, module.lora_rows)[adapter] = own


def end_retraining(module: nn.Module, adapter: str) -> None:
    """Take the adapter's rows off; the last ones give the module its class back."""
    holder = cast(nn.ModuleDict, module.lora_rows)
    del holder[adapter]
    if holder:
        return
    leave(module, Retraining)
