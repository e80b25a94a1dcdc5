"""Logits at chosen positions only: the others are never computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def only_positions(model: nn.Module, index: Tensor) -> Iterator[None]:
    """Inside the block the model's output head sees the hidden states at `index` alone.

    The selection happens before the head, so everything that `forward` does with logits (soft caps, scales) still
    happens to the chosen ones. `index` counts positions in the flattened (rows × tokens); logits come out as
    (1, len(index), vocabulary).
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[index].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
