"""What a side is told and what it reports, as files between processes.

Imports nothing of loratune, since peers read it too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

IGNORED = -100
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """`supervised[i]`: `ids[i]` is a target, predicted from `ids[:i]`."""

    ids: list[int]
    supervised: list[bool]

    @property
    def labels(self) -> list[int]:
        """The ids where supervised, else what cross-entropy ignores; not shifted."""
        return [token if target else IGNORED for token, target in zip(self.ids, self.supervised, strict=True)]

    @property
    def targets(self) -> int:
        return sum(self.supervised)


@dataclass(frozen=True)
class Workload:
    """Token ids, made once for all sides.

    Attributes:
        batch_size: rows of an optimizer step. micro_batch: how many of them a peer takes at once.
        warm: rows of the steps that do not count. rows: what each process goes through, once.
    """

    name: str
    batch_size: int
    micro_batch: int
    warm: list[Row]
    rows: list[Row]

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def supervised(self) -> int:
        return sum(row.targets for row in self.rows)

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Workload:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**found | {part: [Row(**row) for row in found[part]] for part in ("warm", "rows")})


@dataclass(frozen=True)
class Job:
    """One side's work in one process; `base`, `adapter` and `workload` are paths.

    Attributes:
        side: a key of `side.SIDES`.
        order: `own`: rows meet as this side has it; `given`: as they stand in the workload.
        adapters: how many are attached; the first one trains.
        trace: also measure live bytes of one step, outside the timed ones.
        saved: a folder for the trained adapter; none without it.
    """

    side: str
    base: str
    adapter: str
    workload: str
    device: str = "cpu"
    dtype: str = "bf16"
    lr: float = 1e-3
    clip: float = 1.0
    seed: int = 0
    order: Literal["own", "given"] = "own"
    adapters: int = 1
    trace: bool = False
    saved: str = ""
    r: int = 16
    alpha: int = 32

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Job:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Report:
    """What one process measured; seconds of each step that counts, bytes.

    Attributes:
        seconds: of each step; their sum is the total, since what comes between steps belongs to the next one.
        losses: of each step, the warm-up's left out.
        memory: `base_rss`, `peak_rss`, on a GPU `base_allocated`, `peak_allocated`, `peak_reserved`; with a trace
            `live`, the most bytes that a step holds beyond what stood before it.
    """

    seconds: list[float]
    losses: list[float]
    memory: dict[str, int]
    versions: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def in_batches(rows: Sequence[T], size: int) -> list[list[T]]:
    return [list(rows[begin : begin + size]) for begin in range(0, len(rows), size)]


def by_length(rows: Sequence[Row], size: int, seed: int) -> list[list[Row]]:
    """Batches of rows of similar length, the batches in random order."""
    batches = in_batches(sorted(rows, key=lambda row: -len(row.ids)), size)
    random.Random(seed).shuffle(batches)
    return batches
