"""Greedy decoding without a cache, a batch or padding: the whole prefix goes through the model for each token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], stop_ids: Collection[int], most: int) -> tuple[list[int], bool]:
    """The tokens after `prompt` without the stop token, and whether there was one."""
    ids = list(prompt)
    for _ in range(most):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False
