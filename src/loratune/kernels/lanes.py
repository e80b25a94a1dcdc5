"""A packed row as lanes: each segment, with the tokens of its path from the root that it can see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Range = tuple[int, int]

# What one thread does at a time is cut from long lanes, and put together from short ones behind the same path: a
# quarter of a row's pairs at most, and of a long lane's tokens, but no fewer than these. The more, the more is summed.
_RUNS, _PARTS, _PART = 4, 4, 256


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
    """The lanes of a row as the kernels read them: in runs, each of which has one path.

    Attributes:
        runs: (runs, 6) int64: from which of `lanes` to which, how many keys are on their path, from which of `ranges`
            to which it goes, and how many keys are on the paths of the runs before.
        lanes, ranges: (number, 2) int64, the first token and the one after the last.
        keys: how many are on all paths together.
        seen: pairs of a token and one that it sees.
    """

    runs: Tensor
    lanes: Tensor
    ranges: Tensor
    keys: int
    seen: int


@lru_cache(maxsize=4)
def table_of(segments: tuple[int, ...], above: tuple[tuple[int, ...], ...] | None, window: int | None) -> LaneTable:
    """The lanes of a packed row, by the lengths of its segments and what stands above each."""
    whole = list(lanes_of(segments, above, window))
    seen = sum(_pairs(lane, window) for lane in whole)
    runs = _runs([part for lane in whole for part in _parts(lane, window)], window, seen / _RUNS)
    rows: list[tuple[int, ...]] = []
    lanes: list[Range] = []
    ranges: list[Range] = []
    keys = 0
    for run in runs:
        path, known = run[0].path, run[0].known
        rows.append((len(lanes), len(lanes) + len(run), known, len(ranges), len(ranges) + len(path), keys))
        lanes += [lane.own for lane in run]
        ranges += path
        keys += known
    return LaneTable(torch.tensor(rows), torch.tensor(lanes), torch.tensor(ranges or [(0, 0)]), keys, seen)


def _pairs(lane: Lane, window: int | None) -> int:
    """How many keys the tokens of a lane see together: its i-th sees known + i, or as many as its window has."""
    free = lane.length if window is None else min(max(window - lane.known, 0), lane.length)
    return free * lane.known + free * (free + 1) // 2 + (lane.length - free) * (window or 0)


def _parts(lane: Lane, window: int | None) -> Iterator[Lane]:
    """A long lane as several behind each other, for as many threads."""
    number = max(1, min(_PARTS, lane.length // _PART))
    start = lane.own[0]
    cuts = [start + lane.length * i // number for i in range(number + 1)]
    for first, last in pairwise(cuts):
        yield Lane(_in_sight([*lane.path, (start, first)], window), (first, last))


def _runs(lanes: Sequence[Lane], window: int | None, most: float) -> list[list[Lane]]:
    """Neighbours with one path and no more than `most` pairs together, those with the most pairs first."""
    runs: list[list[Lane]] = []
    sizes: list[int] = []
    for lane in lanes:
        pairs = _pairs(lane, window)
        if runs and runs[-1][0].path == lane.path and sizes[-1] + pairs <= most:
            runs[-1].append(lane)
            sizes[-1] += pairs
        else:
            runs.append([lane])
            sizes.append(pairs)
    return [runs[i] for i in sorted(range(len(runs)), key=lambda i: -sizes[i])]
