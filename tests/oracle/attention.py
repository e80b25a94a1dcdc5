"""Attention over a tree of segments: the dense masked softmax, its mask found pair by pair, and trees to try it on."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Above = tuple[tuple[int, ...], ...]


def visibility(segments: tuple[int, ...], above: Above, window: int | None) -> Tensor:
    """Bool (tokens, tokens): which token (row) sees which, pair by pair from what a tree and a window are."""
    node = [segment for segment, length in enumerate(segments) for _ in range(length)]
    depth = [sum(segments[a] for a in path) for path in above]
    position = [token for d, length in zip(depth, segments, strict=True) for token in range(d, d + length)]

    def sees(i: int, j: int) -> bool:
        related = node[j] == node[i] or node[j] in above[node[i]]
        age = position[i] - position[j]
        return related and age >= 0 and (window is None or age < window)

    return torch.tensor([[sees(i, j) for j in range(len(node))] for i in range(len(node))])


def dense(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...], above: Above, window: int | None) -> Tensor:
    """The plain formula over all pairs of tokens, of (heads, tokens, dim): (tokens, heads, dim)."""
    seen = visibility(segments, above, window).to(q.device)
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@st.composite
def trees(draw: Any) -> tuple[tuple[int, ...], Above]:
    """Segments depth first, each below the last one or one of its ancestors, or a root."""
    above: list[tuple[int, ...]] = [()]
    for i in range(1, draw(st.integers(1, 6))):
        path = (*above[-1], i - 1)
        above.append(path[: draw(st.integers(0, len(path)))])
    return tuple(draw(st.integers(1, 9)) for _ in above), tuple(above)
