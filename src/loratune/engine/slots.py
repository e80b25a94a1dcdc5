"""Keys and values of the rows that are being continued: each row has a slot, and those in use stand first.

No pages: a slot holds one row up to the length that all slots have, which doubles when a row outgrows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

_SHORTEST = 256


class Slots(Cache):
    """What `transformers` calls a cache, for a token of each row that goes on and behind these packed prompts.

    Places that no row has are zeros: what a row does not see has the weight 0, and 0 · NaN would be none.

    Attributes:
        count: how many slots there are. most: the longest row.
        length: places that each slot has now, in every layer at least.
    """

    def __init__(self, count: int, most: int) -> None:
        super().__init__(layers=[])
        self.count, self.most = count, most
        self.length = min(_SHORTEST, most)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        # Of each slot, how many of its first places may hold something.
        self._filled = [0] * count
        self._begun: tuple[Sequence[int], Sequence[int]] = (), ()
        self._places = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        self._seen = self._latest = 0

    @property
    def bytes_per_place(self) -> int:
        """Of one token in all layers that have had a pass."""
        tensors = (*self._keys.values(), *self._values.values())
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)

    def take(self, lengths: Sequence[int], slots: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        """The next pass is one token of each of the first slots, which then have these lengths, and prompts.

        Args:
            slots: where prompts of so many tokens (`counts`) begin.
        """
        self._make_room(max((*lengths, *counts)))
        self._begun, self._seen = (slots, counts), max(lengths, default=0)
        self._fill((*range(len(lengths)), *slots), (*lengths, *counts))
        self._places = torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device).long() - 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put what a layer computed into the slots; gives it back, (1, kv heads, tokens, dim)."""
        if layer_idx not in self._keys:
            empty = [t.new_zeros(self.count, t.shape[1], self.length, t.shape[3]) for t in (key_states, value_states)]
            self._keys[layer_idx], self._values[layer_idx] = empty
        self._latest = layer_idx
        rows, places = self._places
        for held, new in ((self._keys[layer_idx], key_states[0]), (self._values[layer_idx], value_states[0])):
            start = len(rows)
            if start:
                held[rows, :, places] = new[:, :start].transpose(0, 1)
            for slot, count in zip(*self._begun, strict=True):
                held[slot, :, :count] = new[:, start : start + count]
                start += count
        return key_states, value_states

    def of_rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows that go on, in the layer that was updated last: views."""
        rows = len(self._places[0])
        keys, values = self._keys[self._latest], self._values[self._latest]
        return keys[:rows, :, : self._seen], values[:rows, :, : self._seen]

    def clear(self, slot: int) -> None:
        """Leave nothing of the row in a slot, whatever it held."""
        for tensors in (self._keys, self._values):
            for tensor in tensors.values():
                tensor[slot, :, : self._filled[slot]] = 0
        self._filled[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Put a row into a slot that is clear; its own is then."""
        filled = self._filled[source]
        for tensors in (self._keys, self._values):
            for tensor in tensors.values():
                tensor[target, :, :filled] = tensor[source, :, :filled]
        self._filled[target] = filled
        self.clear(source)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0  # positions are given with each pass

    def _fill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        for slot, length in zip(slots, lengths, strict=True):
            self._filled[slot] = max(self._filled[slot], length)

    def _make_room(self, needed: int) -> None:
        """Layer by layer, so that one of them at a time stands there twice.

        Where memory ends in the middle, some layers are longer than the others; nobody minds, and nothing is lost.
        """
        if needed <= self.length:
            return
        length = min(self.most, max(needed, 2 * self.length))
        for tensors in (self._keys, self._values):
            for layer, tensor in tensors.items():
                before = tensor.shape[2]
                if before < length:
                    longer = tensor.new_zeros(*tensor.shape[:2], length, tensor.shape[3])
                    longer[:, :, :before] = tensor
                    tensors[layer] = longer
        self.length = length
