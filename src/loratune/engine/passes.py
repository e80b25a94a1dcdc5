"""The two passes of continued rows: over prompts side by side, and over one token of each row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune.adapt import Mixed
from loratune.engine.slots import Slots
from loratune.model import SlotStep, only_positions, packed_inputs

Names = Sequence[str | None]


class Passes:
    """Gives the logits (rows, vocabulary) of each row's last token, and keeps the row's keys and values in its slot.

    Attributes:
        mixed: the adapters that rows may have; with None all have what is active on the model.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots) -> None:
        self.model, self.slots = model, slots
        self.mixed: Mixed | None = None

    def prompts(self, first: int, prompts: Sequence[Sequence[int]], names: Names) -> Tensor:
        """Of rows that begin, in the slots from `first` on: all their tokens, packed."""
        counts = [len(prompt) for prompt in prompts]
        self.slots.take_prompts(range(first, first + len(counts)), counts)
        ids = torch.tensor([[token for prompt in prompts for token in prompt]])
        positions = torch.cat([torch.arange(length) for length in counts])[None]
        ends = torch.tensor(list(accumulate(counts))) - 1
        with only_positions(self.model, ends.to(self.model.device)):
            return self._logits(ids, positions, packed_inputs(tuple(counts)), names, counts)[0]

    def step(self, tokens: Sequence[int], lengths: Sequence[int], names: Names) -> Tensor:
        """Of the rows in the first slots, which have these lengths with the one token that is new."""
        device = self.model.device
        self.slots.take_step(lengths, device)
        ids = torch.tensor(tokens)[:, None]
        positions = torch.tensor(lengths)[:, None] - 1
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # nothing reads it, and none is built
        step = {"step": SlotStep.of(list(lengths), device), "attention_mask": mask}
        return self._logits(ids, positions, step, names, [1] * len(tokens))[:, 0]

    def _logits(
        self, ids: Tensor, positions: Tensor, told: dict[str, Any], names: Names, counts: Sequence[int]
    ) -> Tensor:
        device = self.model.device
        inputs = {**told, "past_key_values": self.slots, "use_cache": True}
        with nullcontext() if self.mixed is None else self.mixed.passing(names, counts, device):
            logits: Tensor = self.model(input_ids=ids.to(device), position_ids=positions.to(device), **inputs).logits
        return logits
