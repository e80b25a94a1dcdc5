"""What a child of the warmed process does: a command, with a fault planted at a moment of it."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.moments import Fault, Moments


class Teller:
    """A child's pipe to who started it; its last line counts."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __call__(self, value: Any) -> None:
        os.write(self._handle, (json.dumps(value) + "\n").encode())


def warm() -> None:
    """Import what a run imports, and nothing that starts a thread."""
    import matplotlib.pyplot as plt  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import loratune.cli
    import loratune.evaluation
    import loratune.report
    import loratune.run
    import loratune.run.setup

    # What it measures is the machine.
    loratune.run.setup.forward_rate = lambda *_: 1e4


def command(_: Teller, words: Sequence[str]) -> int:
    """`loratune …`."""
    from loratune.cli import main

    return main(list(words))


def watched(tell: Teller, words: Sequence[str], place: str, fault: dict[str, Any] | None = None) -> int:
    """The same, its moments counted; with a fault at one of them."""
    from loratune.cli import main

    moments = Moments(place, tell, Fault(**fault) if fault else None)
    with moments.counted():
        code = main(list(words))
    tell({"moments": moments.names, "calls": moments.calls})
    return code


def limited(_: Teller, words: Sequence[str], file_bytes: int) -> int:
    """`loratune …` where no file may grow beyond so many bytes: the system refuses the write that would."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    return command(_, words)


def in_little_memory(tell: Teller, words: Sequence[str], spare: int, kill_at: int = 0) -> int:
    """`loratune …` where training may take `spare` bytes more than it holds at its first step.

    Args:
        kill_at: the step after which it is killed; 0 for none.
    """
    from loratune.run.journal import Journal
    from loratune.training.events import StepDone
    from loratune.training.loop import Loop

    hear = Journal.hear

    def killed(journal: Journal, event: Any) -> None:
        hear(journal, event)
        if isinstance(event, StepDone) and event.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.hear = killed  # type: ignore[method-assign]

    run = Loop.run

    def limited_run(loop: Loop) -> None:
        status = Path("/proc/self/status").read_text().splitlines()
        held = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + spare, hard))
        try:
            run(loop)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))

    Loop.run = limited_run  # type: ignore[method-assign]
    return command(tell, words)


def diverging(tell: Teller, words: Sequence[str], what: str, step: int) -> int:
    """`loratune …` where a step's loss is NaN, or its update brings infinity into a weight."""
    import torch

    from loratune.training import loop

    take = loop.Loop._step
    summed_loss = loop.summed_loss

    def poisoned(self: loop.Loop) -> None:
        if what == "loss" and self.progress.step + 1 == step:
            loop.summed_loss = lambda *args: summed_loss(*args) * float("nan")  # type: ignore[assignment]
        take(self)
        if what == "weights" and self.progress.step == step:
            with torch.no_grad():
                self.lora.parameters()[3][0, 0] = float("inf")

    loop.Loop._step = poisoned  # type: ignore[method-assign]
    return command(tell, words)


def on_small_disk(tell: Teller, words: Sequence[str], disk: str, kilobytes: int, then: str, copy: str) -> int:
    """`loratune …` twice: on a file system of that size, and after it has grown, or was read-only, once more.

    Args:
        disk: an empty folder, where the file system lies for this process alone.
        then: "full": that size first, then a large one. "sealed": large, with one run begun, and read-only first.
        copy: where its files are copied to in the end.
    """
    if not _own_file_systems():
        tell({"granted": False})
        return 0
    _mount(disk, f"size={kilobytes}k")
    if then == "sealed":
        _mount(disk, "", _REMOUNT | _READ_ONLY)
    first = _in_process_of_its_own(lambda: command(tell, words))
    _mount(disk, "size=64m", _REMOUNT)
    second = _in_process_of_its_own(lambda: command(tell, words))
    shutil.copytree(disk, copy, dirs_exist_ok=True)
    tell({"granted": True, "first": first})
    return second


# Of linux/sched.h and linux/mount.h.
_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_READ_ONLY, _REMOUNT = 1, 32
_libc = ctypes.CDLL(None, use_errno=True)


def _own_file_systems() -> bool:
    """Let this process mount what nobody else sees; False where the system does not grant that."""
    user, group = os.getuid(), os.getgid()
    if not hasattr(_libc, "unshare") or _libc.unshare(_NEW_USER | _NEW_MOUNTS) != 0:
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return True


def _mount(place: str, options: str, flags: int = 0) -> None:
    if _libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount", place)


def _in_process_of_its_own(act: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = act()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def without_override(tell: Teller, words: Sequence[str]) -> int:
    """`loratune …` as somebody whom the modes of files bind; root is given up the capability that overrides them."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of linux/capability.h, this process
    data = (ctypes.c_uint32 * 6)()
    if os.getuid() == 0:
        assert _libc.capget(header, data) == 0
        data[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective ones
        assert _libc.capset(header, data) == 0
    return command(tell, words)
