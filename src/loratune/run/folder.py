"""The run folder: its name, what is in it, and whether a run may write into it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loratune.adapter import read_adapter
from loratune.errors import AdapterFileError, RunFolderError
from loratune.files import append_line, is_temporary, locked, sweep, to_json_lines, write_bytes, write_json
from loratune.report.folder import METRICS, RECORD, SAMPLES, damaged_metrics, read_metrics
from loratune.training.events import Measured, measured_event

CHECKPOINTS, LOCK = "checkpoints", ".lock"

_ADJECTIVES = (
    "amber",
    "brave",
    "calm",
    "clever",
    "eager",
    "gentle",
    "happy",
    "keen",
    "lively",
    "mellow",
    "quick",
    "wise",
)
_ANIMALS = ("badger", "crane", "falcon", "finch", "hare", "heron", "ibex", "lynx", "marten", "otter", "puffin", "wren")


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    written_here: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def record(self) -> dict[str, Any] | None:
        """The record, or None where no run has started here."""
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            hint = "name another folder with --out"
            raise RunFolderError(f"{self.path / RECORD} cannot be read: {error}", hint=hint) from None
        if not isinstance(record, dict) or "identity" not in record:
            raise RunFolderError(f"{self.path / RECORD} is no record of a run")
        problems = list(_damage(record))
        if problems:
            hint = "restore it from a copy, or train again with another --out"
            raise RunFolderError([f"{self.path / RECORD}: {problem}" for problem in problems], hint=hint)
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / RECORD, record)

    def add_metrics(self, values: dict[str, Any]) -> None:
        append_line(self.path / METRICS, json.dumps(values, allow_nan=False))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the block this process alone writes here, and a disk that refuses is a `RunFolderError`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path / LOCK):
                for folder in (self.path, self.checkpoints):
                    sweep(folder)
                yield
        except BlockingIOError:
            raise RunFolderError(
                f"{self.path}: another process trains in it", hint="wait, or use another --out"
            ) from None
        except OSError as error:
            where, why = error.filename or self.path, error.strerror or error
            hint = "free some space or choose another folder with --out"
            raise RunFolderError(f"{where} cannot be written: {why}", hint=hint) from error

    def keep_metrics(self, last: int) -> list[Measured]:
        """Keep the events up to step `last`, and return them: what a run logged after its checkpoint goes."""
        found = [(line, event) for line, event in self._logged() if event.step <= last]
        if (self.path / METRICS).is_file():
            write_bytes(self.path / METRICS, b"".join(line + b"\n" for line, _ in found))
        return [event for _, event in found]

    def metrics(self, *, whole: bool = True) -> list[Measured]:
        """The events of `metrics.jsonl`.

        Args:
            whole: whether the run has ended, so that the last line must not be cut off.

        Raises:
            RunFolderError: with each line that is no step and no validation.
        """
        return [event for _, event in self._logged(whole=whole)]

    def _logged(self, *, whole: bool = False) -> list[tuple[bytes, Measured]]:
        """Lines and events."""
        found = read_metrics(self.path)
        events = [(line, measured_event(line.content)) for line in found.lines]
        problems = [f"{METRICS}:{line.number} is no step and no validation" for line, event in events if event is None]
        if whole and found.is_cut:
            problems.append(f"the last line of {METRICS} is half-written")
        if problems:
            raise damaged_metrics(self.path / METRICS, problems)
        return [(line.text, event) for line, event in events if event is not None]

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        write_bytes(self.path / SAMPLES, to_json_lines(samples))


# What every record has, from its first line on, and what each of these is.
_PARTS = {
    "identity": str, "identity_of": dict, "state": str, "created": str, "settings": dict, "base": dict, "data": dict,
    "adapter": dict, "plan": dict, "checks": list, "result": dict, "events": list, "versions": dict, "hardware": dict,
}  # fmt: skip
_WORDS = {str: "a text", dict: "an object", list: "a list"}


def _damage(record: dict[str, Any]) -> Iterator[str]:
    """What of a record is missing, or is not what it is in every record."""
    for name, kind in _PARTS.items():
        if not isinstance(record.get(name), kind):
            yield f"{name!r} is {'missing' if name not in record else 'not ' + _WORDS[kind]}"
    settings = record.get("settings")
    for name, entry in settings.items() if isinstance(settings, dict) else ():
        if not isinstance(entry, dict) or not {"value", "reason"} <= entry.keys():
            yield f"setting {name!r} has not a value and a reason"
    events = record.get("events")
    for number, event in enumerate(events if isinstance(events, list) else (), 1):
        if not isinstance(event, dict) or not isinstance(event.get("step"), int):
            yield f"event {number} names no step"


class WatchedFolder(RunFolder):
    """The folder of a run seen by a process that leaves it to another one to write there."""

    __slots__ = ()
    written_here = False

    def write_record(self, record: dict[str, Any]) -> None:
        pass

    def add_metrics(self, values: dict[str, Any]) -> None:
        pass

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield

    def keep_metrics(self, last: int) -> list[Measured]:
        return [event for event in self.metrics(whole=False) if event.step <= last]

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        pass


def choose_folder(out: str | None) -> RunFolder:
    """The folder asked for, or a new one under `runs/` with a name to remember."""
    if out is not None:
        return RunFolder(Path(out).expanduser())
    while True:  # names repeat after about a hundred runs; a number keeps them apart then
        path = Path("runs") / f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_ANIMALS)}-{secrets.randbelow(1000)}"
        if not path.exists():
            return RunFolder(path)


def refuse_changed(folder: RunFolder, before: dict[str, Any] | None) -> None:
    """Raise where the record is not what it was before the run was made ready."""
    if folder.record() != before:
        hint = "look at it, or use another --out"
        raise RunFolderError(f"{folder.path}: another process trained in it meanwhile", hint=hint)


def refuse_damaged(folder: RunFolder) -> None:
    """Raise where the adapter of a finished run is gone or damaged."""
    try:
        read_adapter(folder.path)
    except AdapterFileError as error:
        hint = "restore its files from a copy, or train again with another --out"
        raise RunFolderError([f"the run is finished, and {problem}" for problem in error.problems], hint=hint) from None


def refuse_foreign(folder: RunFolder) -> dict[str, Any] | None:
    """The record of the run that is in the folder; None where it is new or empty.

    Raises:
        RunFolderError: the folder holds files that no run of ours made.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise RunFolderError(f"{folder.path} is a file", hint="name a folder with --out")
    record = folder.record()
    # A process killed before it wrote a record leaves these.
    is_ours = record is not None or not folder.path.is_dir()
    if not is_ours and not all(path.name == LOCK or is_temporary(path) for path in folder.path.iterdir()):
        raise RunFolderError(f"{folder.path} holds other files and no run", hint="name another folder with --out")
    return record


def refuse_other_run(folder: RunFolder, before: dict[str, Any], now: dict[str, Any], resume: str) -> None:
    """Raise unless the folder's run is the one that the settings, data and base describe.

    Raises:
        RunFolderError: with one line for each difference.
    """
    if resume == "never":
        raise RunFolderError(f"{folder.path} holds a run already", hint="name another with --out, or --resume auto")
    if before["identity"] == now["identity"]:
        return
    hint = "name another folder with --out, or repeat its settings"
    raise RunFolderError([f"{folder.path} holds another run", *differences(before, now)], hint=hint)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What decides a run's result and is not the same in two records, a line each."""
    old, new = before.get("identity_of", {}), now["identity_of"]
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in changed]


def refuse_taken(folder: Path) -> None:
    """Raise unless the folder can be written anew: it is not there, or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists already", hint="name another folder with --out")
