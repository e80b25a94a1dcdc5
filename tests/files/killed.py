"""Runs a write again and again and kills it before its 1st, 2nd, 3rd … operation on the disk.

    python -m tests.files.killed SCENARIO FOLDER [again]

FOLDER/1, FOLDER/2, … hold what each kill left; the last one is what the undisturbed write left. With `again`, each
kill's remains are recovered, and that recovery is killed at each of its operations too: FOLDER/1.1, FOLDER/1.2, …
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from loratune import files

OLD = {"a": b"old a", "b": b"old b" * 1000, "kept": b"kept"}
NEW = {"a": b"new a" * 1000, "b": b"new b", "c": b"new c"}
_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}


def fill(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in OLD.items():
        (folder / name).write_bytes(content)


def _new_folder(path: Path) -> None:
    with files.new_folder(path) as folder:
        for name, content in NEW.items():
            (folder / name).write_bytes(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "d").write_bytes(b"new d")


# Name → (what is there before, what is done); the thing in question is always called `it`.
SCENARIOS: dict[str, tuple[bool, Callable[[Path], None]]] = {
    "together, over old files": (True, lambda it: files.write_together(it, NEW)),
    "together, first time": (False, lambda it: files.write_together(it, NEW)),
    "new folder, over an old one": (True, _new_folder),
    "new folder, first time": (False, _new_folder),
    "one file": (True, lambda it: files.write_bytes(it / "a", NEW["a"])),
}


def killed_at(number: int, act: Callable[[], None]) -> bool:
    """Whether the child that acts died before its `number`-th operation."""
    child = os.fork()
    if child == 0:
        left = number

        def count(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        fsync = os.fsync
        os.fsync = lambda handle: (count(), fsync(handle))  # type: ignore[assignment, return-value]
        sys.addaudithook(lambda event, _: count() if event in _EVENTS else None)
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the write itself failed"
    return os.WIFSIGNALED(status)


def main(scenario: str, root: Path, *, again: bool) -> None:
    before, write = SCENARIOS[scenario]
    number, going = 0, True
    while going:
        number += 1
        place = root / str(number)
        place.mkdir()
        if before:
            fill(place / "it")
        going = killed_at(number, lambda place=place: write(place / "it"))  # type: ignore[misc]
        recovery, going_on = 0, again
        while going_on:
            recovery += 1
            copy = root / f"{number}.{recovery}"
            shutil.copytree(place, copy)
            going_on = killed_at(recovery, lambda copy=copy: files.recover(copy / "it"))  # type: ignore[misc]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), again="again" in sys.argv[3:])
