"""A pass over continued rows: one token of each that goes on, and behind these the prompts of those that begin."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate, chain
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

    def over(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        prompts: Sequence[Sequence[int]],
        names: Names,
        *,
        first: int | None = None,
    ) -> Tensor:
        """All in one, so that the model's weights are read once.

        Args:
            tokens: those that are new in the rows of the first slots, which have these lengths with them.
            prompts: of rows that begin, in the slots from `first` on, which stand behind the others without it.
            names: of all these rows' adapters.
        """
        device, counts = self.model.device, [len(prompt) for prompt in prompts]
        begin = len(tokens) if first is None else first
        self.slots.take(lengths, range(begin, begin + len(counts)), counts, device)
        ids = torch.tensor([[*tokens, *chain.from_iterable(prompts)]])
        places = torch.cat([torch.tensor(lengths).long() - 1, *(torch.arange(count) for count in counts)])
        # Nothing reads the mask, and none is built.
        told: dict[str, Any] = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
        if counts:
            told = packed_inputs(tuple(counts))
        if lengths:
            told["step"] = SlotStep.of(lengths, self.slots, device)
        inputs = {**told, "past_key_values": self.slots, "use_cache": True}
        ends = torch.tensor([*accumulate((*(1 for _ in tokens), *counts))], device=device) - 1
        with ExitStack() as inside:
            if counts:
                inside.enter_context(only_positions(self.model, ends))
            if self.mixed is not None:
                inside.enter_context(self.mixed.passing(names, [*(1 for _ in tokens), *counts], device))
            ids, places = ids.to(device), places[None].to(device)
            logits: Tensor = self.model(input_ids=ids, position_ids=places, **inputs).logits
        return logits[0]
