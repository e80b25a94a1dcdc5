"""A packed row as lanes: each segment, with the tokens of its path from the root that it can see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Range = tuple[int, int]


class Lane(NamedTuple):
    """Tokens `own`, after the tokens of `path` (ranges in order) that its queries can see."""

    path: tuple[Range, ...]
    own: Range

    @property
    def length(self) -> int:
        return self.own[1] - self.own[0]

    @property
    def known(self) -> int:
        return sum(stop - start for start, stop in self.path)


def lanes_of(segments: Sequence[int], above: Sequence[tuple[int, ...]] | None, window: int | None) -> Iterator[Lane]:
    """A lane for each segment; a segment with nothing above it starts afresh, as all do where `above` is None."""
    starts = [0]
    for length in segments:
        starts.append(starts[-1] + length)
    for start, stop, path in zip(starts[:-1], starts[1:], above or ((),) * len(segments), strict=True):
        yield Lane(_in_sight([(starts[a], starts[a + 1]) for a in path], window), (start, stop))


def _in_sight(path: Sequence[Range], window: int | None) -> tuple[Range, ...]:
    """The last tokens of a path, as far as the window of the next one reaches back; adjoining ranges are one."""
    room = math.inf if window is None else window - 1
    found: list[Range] = []
    for start, stop in reversed(path):
        begin = int(max(start, stop - room))
        if begin < stop:
            if found and found[-1][0] == stop:
                found[-1] = (begin, found[-1][1])
            else:
                found.append((begin, stop))
            room -= stop - begin
    return tuple(reversed(found))


class LaneTable(NamedTuple):
    """The lanes of a row as the kernels read them.

    Attributes:
        lanes: (lanes, 6) int64: the first token and the one after the last, how many keys are on its path, from which
            of `ranges` to which its path goes, and how many keys are on the paths of the lanes before it.
        ranges: (ranges, 2) int64, of tokens.
        keys: how many are on all paths together.
        seen: pairs of a token and one that it sees.
    """

    lanes: Tensor
    ranges: Tensor
    keys: int
    seen: int


@lru_cache(maxsize=4)
def table_of(segments: tuple[int, ...], above: tuple[tuple[int, ...], ...] | None, window: int | None) -> LaneTable:
    """The lanes of a packed row, by the lengths of its segments and what stands above each."""
    rows: list[tuple[int, ...]] = []
    ranges: list[tuple[int, int]] = []
    keys = seen = 0
    for lane in lanes_of(segments, above, window):
        rows.append((*lane.own, lane.known, len(ranges), len(ranges) + len(lane.path), keys))
        ranges += lane.path
        keys += lane.known
        most = lane.known + lane.length if window is None else window
        seen += sum(min(lane.known + i + 1, most) for i in range(lane.length))
    return LaneTable(torch.tensor(rows), torch.tensor(ranges or [(0, 0)]), keys, seen)
