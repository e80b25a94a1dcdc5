"""`reproduce`: a finished run done again from its record, and whether the same came out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import torch

from loratune.errors import CheckError, RunFolderError
from loratune.report.folder import METRICS
from loratune.run.decide import DEFAULT
from loratune.run.events import Begun, Event, RunListener, Said, StepDone
from loratune.run.folder import RunFolder, differences, refuse_taken
from loratune.run.journal import CHANGED
from loratune.run.record import changed_conditions, changed_versions
from loratune.run.train import train
from loratune.training.events import Measured

# How far a loss may be from the run's, relative, where other bits are to be expected.
BAND = 0.02
_ADAPTER = "adapter_model.safetensors"
_AS_LEFT = "the folder must be as the run left it"
# Settings that say where a run is, how it is watched, and what is done beside it.
_BESIDE = frozenset({"out", "resume", "log_with", "keep", "save_every", "samples", "checks", "device", "shard"})
# What memory forced on the first run need not happen again; and it may have gone on elsewhere than it began.
_FORCED = frozenset({"out of memory", "micro-batch", CHANGED})


@dataclass(frozen=True)
class Reproduction:
    """What came out the second time.

    Attributes:
        path: the new run's folder, or None where it was not to be kept.
        elsewhere: why other bits are to be expected: what of machine and versions is another; empty where nothing is.
        same_adapter: the files are equal, byte by byte.
        first_other_step: the first step with another number in its metrics, or None.
        loss, val_loss: the largest relative deviation of a step's loss (of its mean over a twentieth of the steps) and
            of a held-out loss.
    """

    path: str | None
    elsewhere: tuple[str, ...]
    same_adapter: bool
    first_other_step: int | None
    loss: float
    val_loss: float

    @property
    def same_bits(self) -> bool:
        return self.same_adapter and self.first_other_step is None

    @property
    def within(self) -> bool:
        return max(self.loss, self.val_loss) <= BAND

    @property
    def passed(self) -> bool:
        return self.same_bits or (bool(self.elsewhere) and self.within)

    @property
    def line(self) -> str:
        """The outcome in one sentence."""
        if self.same_bits:
            return "the same bits: adapter, losses and gradient norms"
        if self.first_other_step is None:
            return "another adapter: all losses and gradient norms are the same"
        adapter = "the same adapter" if self.same_adapter else "another adapter"
        far = f"losses within {self.loss:.2%}, held-out losses within {self.val_loss:.2%}"
        return f"other bits from step {self.first_other_step} on: {far}, {adapter}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "same_bits": self.same_bits, "within": self.within, "passed": self.passed, "band": BAND}


def reproduce(
    run: str | Path,
    *,
    model: Any = None,
    data: Any = None,
    out: str | Path | None = None,
    device: str | None = None,
    any_versions: bool = False,
    listen: RunListener | None = None,
) -> Reproduction:
    """Do a run again from its record, on the same rows and base, and compare what comes out.

    On the same machine, with the same versions and threads, the same bits are expected; elsewhere losses within `BAND`.

    Args:
        model, data: where base and rows are now; where the record says otherwise.
        out: a folder for the new run; it is not kept otherwise.
        device: the run's own where it is None.
        any_versions: go on where other versions of packages are installed than the run had.

    Raises:
        RunFolderError: no finished run, or one that cannot be done again here; with all that differs: rows, base,
            template, settings, versions.
        CheckError: something else came out. What else `train` raises.
    """
    path = Path(run).expanduser()
    record = _finished(RunFolder(path))
    if out is not None:
        refuse_taken(Path(out))
    with tempfile.TemporaryDirectory(prefix="loratune-") as place, _threads(record["hardware"]["cores"]):
        folder = Path(out or Path(place) / path.resolve().name)
        settings = _settings(record) | {"device": device or record["settings"]["device"]["value"]}

        def hear(event: Event | Said | Begun) -> None:
            if isinstance(event, Begun):
                _refuse_another(path, record, _record_in(folder), any_versions=any_versions)
            gone = isinstance(event, Said) and event.topic == "saved" and out is None
            if listen is not None and not gone:  # its folder is not kept
                listen(event)

        again = train(
            record["base"]["name"] if model is None else model,
            _rows(record, data),
            listen=hear,
            out=str(folder),
            checks="off",
            samples=0,
            keep=1,
            **settings,
        )
        found = _compared(path, record, again.path, again.record, kept=out is not None)
    if not found.passed:
        expected = f"losses within {BAND:.0%}" if found.elsewhere else "the same bits"
        changed = METRICS if found.same_adapter else _ADAPTER if found.first_other_step is None else "a file of the run"
        hint = f"{changed} may have been changed since"
        if not found.same_adapter and found.first_other_step is not None:
            hint += ", or the machine computes otherwise than it did"
        raise CheckError([f"{path}, done again, gave {found.line}", f"{expected} were expected"], hint=hint)
    return found


def _finished(folder: RunFolder) -> dict[str, Any]:
    record = folder.record()
    if record is None:
        raise RunFolderError(f"{folder.path} holds no run", hint="name a folder that `loratune train` made")
    if record["state"] == "failed":
        text = f"{folder.path}: the run failed: {record.get('error') or 'without a word'}"
        hint = "only what is finished can be done again; `loratune train` goes on from its last checkpoint"
        raise RunFolderError(text, hint=hint)
    if record["state"] != "finished":
        raise RunFolderError(f"{folder.path}: the run is {record['state']}", hint="let `loratune train` finish it")
    for name in (METRICS, _ADAPTER):
        if not (folder.path / name).is_file():
            raise RunFolderError(f"{folder.path / name} is not there", hint=_AS_LEFT)
    steps = {event.step for event in folder.metrics() if isinstance(event, StepDone)}
    done = record["result"].get("steps")
    lacking = next(step for step in count(1) if step not in steps)
    if lacking <= max(1, *steps, done if isinstance(done, int) else 0):
        raise RunFolderError(f"{folder.path / METRICS}: step {lacking} is missing", hint=_AS_LEFT)
    return record


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was given or decided, for a run that decides nothing."""
    settings = record["settings"]
    leave = {*_BESIDE, *(("modules_to_save",) if settings["method"]["value"] == "full" else ())}
    return {name: one["value"] for name, one in settings.items() if name not in leave and one["reason"] != DEFAULT} | {
        "method": settings["method"]["value"]
    }


def _rows(record: Mapping[str, Any], data: Any) -> Any:
    if data is not None:
        return data
    if record["data"]["source"] == "rows":
        raise RunFolderError("its rows were given as objects, which no record holds", hint="give them again as data")
    return record["data"]["source"]


def _record_in(folder: Path) -> dict[str, Any]:
    record = RunFolder(folder).record()
    assert record is not None, "it is written before the first step"
    return record


def _refuse_another(path: Path, record: dict[str, Any], now: dict[str, Any], *, any_versions: bool) -> None:
    """Raise where this is not the run, or would not be computed by the same code."""
    found, hints = differences(record, now), []
    if found:
        hints.append("--base and --data say where the run's own are now")
    changed = changed_versions(record, now)
    if changed and not any_versions:
        found += _said(changed)
        hints.append("install those, or compare losses with --any-versions")
    if found:
        raise RunFolderError([f"{path} cannot be done again here", *found], hint="; ".join(hints))


def _said(changed: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{name}: {before} there, {after} now" for name, before, after in changed]


def _elsewhere(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why other bits are no fault."""
    found = _said(changed_conditions(record, now))
    return found + [f"{e['kind']} there: {e['text']}" for e in record["events"] if e["kind"] in _FORCED]


def _compared(
    path: Path, record: Mapping[str, Any], again: Path, now: Mapping[str, Any], *, kept: bool
) -> Reproduction:
    before, after = (_numbers(RunFolder(folder).metrics()) for folder in (path, again))
    other = [step for step in sorted({*before, *after}) if before.get(step) != after.get(step)]
    losses = [{step: numbers["loss"] for step, numbers in one.items() if "loss" in numbers} for one in (before, after)]
    held_out = [
        {step: numbers["val_loss"] for step, numbers in one.items() if "val_loss" in numbers} for one in (before, after)
    ]
    return Reproduction(
        path=str(again) if kept else None,
        elsewhere=tuple(_elsewhere(record, now)),
        same_adapter=_hash(path) == _hash(again),
        first_other_step=other[0] if other else None,
        loss=_furthest(*(_smoothed(one) for one in losses)),
        val_loss=_furthest(*held_out),
    )


def _numbers(events: Iterable[Measured]) -> dict[int, dict[str, float]]:
    """Step → its numbers that do not depend on the clock or the memory."""
    found: dict[int, dict[str, float]] = {}
    for event in events:
        numbers = {
            name: getattr(event, name) for name in ("loss", "grad_norm", "lr", "val_loss") if hasattr(event, name)
        }
        found.setdefault(event.step, {}).update(numbers)
    return found


def _smoothed(losses: Mapping[int, float]) -> dict[int, float]:
    """Means over a twentieth of the steps: single steps differ by more than what is learned does."""
    size = max(1, len(losses) // 20)
    steps = sorted(losses)
    parts = [steps[begin : begin + size] for begin in range(0, len(steps), size)]
    return {part[-1]: sum(losses[step] for step in part) / len(part) for part in parts}


def _furthest(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """The largest relative deviation; infinite where one has a step that the other has not, or no number."""
    if before.keys() != after.keys():
        return math.inf
    apart = [abs(after[step] / loss - 1) if loss else math.inf for step, loss in before.items() if after[step] != loss]
    return math.inf if any(map(math.isnan, apart)) else max(apart, default=0.0)


def _hash(folder: Path) -> str:
    return sha256((folder / _ADAPTER).read_bytes()).hexdigest()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the run had: sums are cut by them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
