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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from loratune import files

SET = {"a": b"old a", "b": b"old b" * 1000}
OLD = {**SET, "kept": b"kept"}
NEW = {"a": b"new a" * 1000, "b": b"new b", "c": b"new c"}
_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}


def fill(folder: Path, contents: Mapping[str, bytes] = OLD) -> None:
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def _new_folder(path: Path) -> None:
    with files.new_folder(path) as folder:
        for name, content in NEW.items():
            (folder / name).write_bytes(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "d").write_bytes(b"new d")


def _together(path: Path) -> None:
    files.write_together(path, NEW)


def _where_nothing_is_exchanged(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        files._exchange = lambda *_: False
        write(path)

    return act


class Scenario(NamedTuple):
    """Attributes:
    before: the files that are there, None where there is not even a folder.
    at_once: whether a reader that recovers nothing sees the old or the new at any moment.
    """

    before: Mapping[str, bytes] | None
    write: Callable[[Path], None]
    at_once: bool = True


# What is written is always called `it`.
SCENARIOS: dict[str, Scenario] = {
    "together, over the old set": Scenario(SET, _together),
    "together, into an empty folder": Scenario({}, _together),
    "together, first time": Scenario(None, _together),
    "together, among other files": Scenario(OLD, _together, at_once=False),
    "together, without an exchange": Scenario(SET, _where_nothing_is_exchanged(_together), at_once=False),
    "new folder, over an old one": Scenario(OLD, _new_folder),
    "new folder, first time": Scenario(None, _new_folder),
    "new folder, without an exchange": Scenario(OLD, _where_nothing_is_exchanged(_new_folder), at_once=False),
    "one file": Scenario(OLD, lambda it: files.write_bytes(it / "a", NEW["a"]), at_once=False),
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
    before, write, _ = SCENARIOS[scenario]
    number, going = 0, True
    while going:
        number += 1
        place = root / str(number)
        place.mkdir()
        if before is not None:
            fill(place / "it", before)
        going = killed_at(number, lambda place=place: write(place / "it"))  # type: ignore[misc]
        recovery, going_on = 0, again
        while going_on:
            recovery += 1
            copy = root / f"{number}.{recovery}"
            shutil.copytree(place, copy)
            going_on = killed_at(recovery, lambda copy=copy: files.recover(copy / "it"))  # type: ignore[misc]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), again="again" in sys.argv[3:])
