"""The moments of a run, in its order, and a fault at one of them.

A moment is an operation on the disk, the beginning of a part of the work (a forward pass, an optimizer step, a check),
or the call of any function at all. All are the same from run to run, so that a fault is told again by its number.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("start", "step", "validation", "checkpoint", "checks", "final save", "between")

# Functions that are a phase while they run, and others whose calls are moments of the phase they are in.
_BEGIN = {
    ("loratune.training.loop", "Loop._step"): "step",
    ("loratune.run.train", "held_out_loss"): "validation",
    ("loratune.run.train", "save_checkpoint"): "checkpoint",
    ("loratune.run.proof", "Proof.before"): "checks",
    ("loratune.run.proof", "Proof.after"): "checks",
    ("loratune.run.train", "_save"): "final save",
}
_PARTS = {
    ("loratune.training.loop", "summed_loss"): "forward",
    ("loratune.training.loop", "set_lr"): "optimizer",
    ("loratune.training.loop", "Loop._validate"): "validated",
    ("loratune.run.train", "attach"): "attach",
    ("loratune.run.train", "restore"): "restore",
    ("loratune.training.checks", "eval_logits"): "logits",
    ("loratune.run.train", "take_samples"): "samples",
    ("loratune.run.journal", "write_report"): "report",
    ("safetensors.torch", "save_file"): "tensors",
}
_ON_DISK = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}


@dataclass(frozen=True)
class Fault:
    """Attributes:
    what: "kill"; "signal", with its number; "full", from which moment on the disk takes nothing.
    at: the number of the moment, from 1.
    of_calls: whether calls of functions are counted, and no other moments.
    """

    what: str
    at: int
    number: int = 0
    of_calls: bool = False


class Moments:
    """Counts the moments of what is done inside `counted`, and plants the fault."""

    def __init__(self, place: str, tell: Callable[[Any], None], fault: Fault | None) -> None:
        self.names: list[str] = []
        self.calls = 0
        self._place = place
        self._tell = tell
        self._fault = fault
        self._phases = ["start"]
        self._deaf = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        for (module, name), phase in _BEGIN.items():
            self._wrap(module, name, phase, begins=True)
        for (module, name), part in _PARTS.items():
            self._wrap(module, name, part, begins=False)
        fsync = os.fsync
        os.fsync = lambda handle: (self._on_disk("fsync", _path_of(handle)), fsync(handle))[1]  # type: ignore[assignment, func-returns-value]
        sys.addaudithook(self._audit)
        if self._fault is None or self._fault.of_calls:
            sys.setprofile(self._count_call)
        try:
            yield
        finally:
            sys.setprofile(None)
            self._deaf = True

    def _wrap(self, module: str, name: str, label: str, *, begins: bool) -> None:
        owner: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        function = getattr(owner, last)

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if not begins:
                self._moment(label)
                return function(*args, **kwargs)
            self._phases = ["between", *self._phases[1:], label]
            self._moment("begins")
            try:
                return function(*args, **kwargs)
            finally:
                self._moment("ends")
                self._phases.pop()

        setattr(owner, last, noted)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _ON_DISK or self._deaf:
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            return
        path = args[1] if event == "os.rename" else args[0]
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        # Deleting a tree names what is in it by handles of the folders.
        if path.startswith(self._place) or not Path(path).is_absolute():
            self._on_disk(event.removeprefix("os."), path)

    def _on_disk(self, what: str, path: str) -> None:
        if not path.startswith(self._place) and Path(path).is_absolute():
            return
        self._moment(f"{what} {re.sub('[.][0-9]+[.]', '.', Path(path).name)}")
        fault = self._fault
        grows = what in ("open", "mkdir", "fsync")
        if fault and fault.what == "full" and len(self.names) >= fault.at and grows and not self._deaf:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def _moment(self, what: str) -> None:
        if self._deaf:
            return
        self.names.append(f"{self._phases[-1]}: {what}")
        fault = self._fault
        if fault and not fault.of_calls and len(self.names) == fault.at:
            self._strike(self.names[-1])

    def _count_call(self, _frame: Any, event: str, _: Any) -> None:
        if event not in ("call", "c_call") or self._deaf:
            return
        self.calls += 1
        fault = self._fault
        if fault and fault.of_calls and self.calls == fault.at:
            self._strike(f"{self._phases[-1]}: call {self.calls}")

    def _strike(self, where: str) -> None:
        fault = self._fault
        assert fault is not None
        self._tell({"struck": where})
        if fault.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.what == "signal":
            os.kill(os.getpid(), fault.number)


def _path_of(handle: int) -> str:
    return str(Path(f"/proc/self/fd/{handle}").readlink())
