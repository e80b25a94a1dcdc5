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
    """What `transformers` calls a cache, for packed prompts and for steps of one token a row.

    Attributes:
        count: how many slots there are. most: the longest row.
        length: places that each slot has now.
    """

    def __init__(self, count: int, most: int) -> None:
        super().__init__(layers=[])
        self.count, self.most = count, most
        self.length = min(_SHORTEST, most)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._prompts: tuple[Sequence[int], Sequence[int]] | None = None
        self._places: tuple[Tensor, Tensor] | None = None
        self._seen = 0

    def take_prompts(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """The next pass is a packed row of prompts of so many tokens, for these slots."""
        self._prompts, self._places = (slots, counts), None
        self._make_room(max(counts))

    def take_step(self, lengths: Sequence[int], device: torch.device) -> None:
        """The next pass is one token of each of the first slots, which then have these lengths."""
        self._prompts, self._seen = None, max(lengths)
        self._make_room(self._seen)
        rows = torch.arange(len(lengths), device=device)
        self._places = rows, torch.tensor(lengths, device=device) - 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put what a layer computed into the slots; gives what its attention sees."""
        if layer_idx not in self._keys:
            # Zeros: what a row does not see has the weight 0, and 0 · NaN would be none.
            heads, dim = key_states.shape[1], key_states.shape[3]
            self._keys[layer_idx] = key_states.new_zeros(self.count, heads, self.length, dim)
            self._values[layer_idx] = value_states.new_zeros(self.count, heads, self.length, value_states.shape[-1])
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if self._prompts is not None:
            start = 0
            for slot, count in zip(*self._prompts, strict=True):
                keys[slot, :, :count] = key_states[0, :, start : start + count]
                values[slot, :, :count] = value_states[0, :, start : start + count]
                start += count
            return key_states, value_states
        assert self._places is not None, "told what the pass is"
        rows, places = self._places
        keys[rows, :, places] = key_states[:, :, 0]
        values[rows, :, places] = value_states[:, :, 0]
        return keys[: len(rows), :, : self._seen], values[: len(rows), :, : self._seen]

    def move(self, source: int, target: int, length: int) -> None:
        """Put a row of this length into another slot."""
        for tensors in (self._keys, self._values):
            for tensor in tensors.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0  # positions are given with each pass

    def _make_room(self, needed: int) -> None:
        if needed <= self.length:
            return
        before, self.length = self.length, min(self.most, max(needed, 2 * self.length))
        for tensors in (self._keys, self._values):
            for layer, tensor in tensors.items():
                count, heads, _, dim = tensor.shape
                tensors[layer] = tensor.new_zeros(count, heads, self.length, dim)
                tensors[layer][:, :, :before] = tensor
