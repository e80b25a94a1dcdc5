"""Effective rank by layer and kind of module: how much of its r each adapter uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from loratune.report.folder import Adapter, EffectiveRank

# With more columns a number no longer fits its cell.
_NUMBERED_LAYERS = 36


@dataclass(frozen=True)
class Cell:
    text: str
    share: float
    about: str


@dataclass(frozen=True)
class Ranks:
    """Layers are columns, kinds of module are rows; a cell is None where nothing is adapted.

    Attributes:
        line: all of it in one sentence.
        is_numbered: whether there is room for the numbers in the cells.
        others: modules outside numbered layers.
    """

    line: str
    layers: list[int]
    rows: list[tuple[str, list[Cell | None]]]
    others: list[tuple[str, Cell]]
    is_numbered: bool


def ranks_of(items: Sequence[EffectiveRank]) -> Ranks | None:
    """None where no effective rank was recorded."""
    cells: dict[tuple[str, int], Cell] = {}
    others: list[tuple[str, Cell]] = []
    known = [(item, item.effective) for item in items if item.effective is not None]
    if not known:
        return None
    for item, effective in known:
        of = f" of {item.r}" if item.r else ""
        cell = Cell(
            f"{effective:.1f}", min(1.0, effective / item.r) if item.r else 0.0, f"{item.path}: {effective:.2f}{of}"
        )
        number = re.search(r"(?:^|\.)(\d+)(?=\.)", item.path)
        if number:
            kind = item.path[: number.start(1)] + "*" + item.path[number.end(1) :]
            cells[kind, int(number[1])] = cell
        else:
            others.append((item.path, cell))
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells})
    names = _short_names(kinds)
    rows = [(names[kind], [cells.get((kind, layer)) for layer in layers]) for kind in kinds]
    line = _line([effective for _, effective in known], [item.r for item, _ in known if item.r])
    return Ranks(line, layers, rows, others, len(layers) <= _NUMBERED_LAYERS)


def smaller_line(adapter: Adapter) -> str:
    """Whether a smaller rank would have done, in a sentence; empty where that was not measured."""
    found = adapter.smaller_ranks
    tried = [(cut.r, cut.val_loss) for cut in found.tried if cut.r is not None and cut.val_loss is not None]
    if found.enough is None or found.val_loss is None or not tried:
        return ""
    losses = ", ".join(f"{loss:.4f} at rank {r}" for r, loss in tried)
    is_less = any(r == found.enough for r, _ in tried)
    words = f"Rank {found.enough} would have done" if is_less else f"All of rank {found.enough} is used"
    return f"{words}: held-out loss {found.val_loss:.4f}, and with the update cut to fewer directions {losses}."


def _short_names(kinds: Sequence[str]) -> dict[str, str]:
    """Last names where these tell the kinds apart, otherwise whole paths (an encoder and a decoder both have a `q`)."""
    last = {kind: kind.rpartition(".")[2] for kind in kinds}
    return last if len(set(last.values())) == len(kinds) else {kind: kind for kind in kinds}


def _line(values: Sequence[float], r: Sequence[int]) -> str:
    ordered = sorted(values)
    of = f" of {max(r)}" if r else ""
    return f"Median {ordered[len(ordered) // 2]:.1f}, from {ordered[0]:.1f} to {ordered[-1]:.1f}{of}."
