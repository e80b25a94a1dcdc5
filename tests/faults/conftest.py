"""A base, data, a warmed process and the run that nothing disturbed; no test may change them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.warmed import Ended, Warmed
from tests.models import additions, saved, write_jsonl

SETTINGS = (
    "--max-steps=6", "--lr=1e-2", "--rank=4", "--dtype=fp32", "--device=cpu", "--samples=1",
    "--val=4", "--eval-every=3", "--save-every=2", "--keep=2", "--dropout=0.1",
)  # fmt: skip
# What tells of times, and the folders that say where a file lies.
_TIMES = ("record.json", "metrics.jsonl", "report.html")


@dataclass(frozen=True)
class Place:
    """A folder of its own for one run, and the command that makes the run."""

    root: Path
    base: Path
    data: Path
    settings: tuple[str, ...] = SETTINGS

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def train(self) -> list[str]:
        return ["train", str(self.base), str(self.data), "--out", str(self.run), *self.settings]

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.run / "record.json").read_text())
        return record

    def outcome(self) -> Outcome:
        # Which checkpoints stay beside the last depends on where a run stopped.
        *older, _ = sorted((self.run / "checkpoints").glob("step-*"))
        files = {
            str(path.relative_to(self.root)): None if path.name in _TIMES else path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file() and path.parent not in older and path.name != ".lock"  # nobody's, after a kill
        }
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        metrics = [{key: line[key] for key in ("step", "loss", "val_loss", "lr") if key in line} for line in lines]
        record = self.record()
        checks = [check["name"] for check in record["checks"] if check["passed"]]
        return Outcome(files, metrics, record["state"], record["result"], checks)


@dataclass(frozen=True)
class Outcome:
    """What must be the same, whatever came in between: every file, and of those with times what has none."""

    files: dict[str, bytes | None]
    metrics: list[dict[str, Any]]
    state: str
    result: dict[str, Any]
    checks: list[str]


@dataclass(frozen=True)
class Whole:
    """The undisturbed run.

    Attributes:
        moments: their names, in order. calls: how many functions were called. seconds: what it took.
    """

    outcome: Outcome
    moments: list[str] = field(repr=False)
    calls: int
    seconds: float

    def of(self, phase: str) -> list[int]:
        """The numbers of a phase's moments."""
        return [number for number, name in enumerate(self.moments, 1) if name.startswith(f"{phase}:")]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", additions(24))


@pytest.fixture(scope="session")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warmed]:
    process = Warmed(tmp_path_factory.mktemp("warmed"))
    yield process
    process.close()


@pytest.fixture
def place(tmp_path: Path, base: Path, data: Path) -> Place:
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place", base, data)


@pytest.fixture(scope="session")
def whole(warmed: Warmed, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    plain = Place(tmp_path_factory.mktemp("plain"), base, data)
    ended = warmed("command", words=plain.train)
    assert ended.code == 0, ended.printed
    watched = Place(tmp_path_factory.mktemp("watched"), base, data)
    seen = warmed("watched", words=watched.train, place=str(watched.root))
    assert seen.code == 0, seen.printed
    assert watched.outcome() == plain.outcome(), "watching changes nothing"
    return Whole(plain.outcome(), seen.said["moments"], seen.said["calls"], ended.seconds)


def goes_on(warmed: Warmed, place: Place, whole: Whole) -> Ended:
    """The same command again; it must end as the undisturbed run did."""
    ended = warmed("command", words=place.train)
    assert ended.code == 0, ended.printed
    assert ended.is_typed
    now, then = place.outcome(), whole.outcome
    other = {name for name in now.files.keys() | then.files.keys() if now.files.get(name, 0) != then.files.get(name, 0)}
    assert not other, f"other files than the undisturbed run's: {sorted(other)}"
    assert now == then
    return ended
