"""The one place that writes files: to a temporary name, flushed to the disk, then renamed.

A kill at any moment leaves the old content or the new one. Several files that belong together are first completed in
a sibling folder; renaming that folder is the moment they count, and `finish` ends what a kill interrupted.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_STAGED = ".staged"
_COMMITTED = ".committed"


def to_json(value: Any) -> bytes:
    """JSON as this project writes it: indent 2, sorted keys, a final newline, no NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, to_json(value))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system lets go of it when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log and hand it to the operating system, so that a killed process has written it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files of a folder so that all are the old ones or, after `recover`, all the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    staged = folder / _STAGED
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for name, content in contents.items():
        write_bytes(staged / name, content)
    staged.replace(folder / _COMMITTED)
    _sync_folder(folder)
    recover(folder)


def recover(folder: Path) -> None:
    """`finish`, and drop an incomplete set: for who writes here, since it may be another writer's."""
    finish(folder)
    shutil.rmtree(folder / _STAGED, ignore_errors=True)


def finish(folder: Path) -> None:
    """Finish what was killed: a complete set moves in, a folder that was moved aside comes back."""
    if not folder.exists():
        for aside in folder.parent.glob(f".{glob.escape(folder.name)}.*.old"):
            aside.replace(folder)
            break
    committed = folder / _COMMITTED
    if _is_ours(committed):
        # Its writer, or another reader, may be moving the same files: whoever comes second finds them in place.
        with suppress(FileNotFoundError):
            for path in sorted(committed.iterdir()):
                path.replace(folder / path.name)
            committed.rmdir()
        _sync_folder(folder)


def _is_ours(committed: Path) -> bool:
    """Whether this is a set of files as `write_together` leaves it: in a folder from elsewhere it may be anything."""
    if not committed.is_dir() or committed.is_symlink():
        return False
    return all(path.is_file() and not path.is_symlink() for path in committed.iterdir())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an error.

    An existing `path` is replaced: it is moved aside first, so a kill leaves the new one complete or, after `recover`,
    the old one, never half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        _sync_folder(temporary)
        if path.exists():
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.replace(aside)
            temporary.replace(path)
            # Under this name no `recover` takes what is left of it for the old folder.
            aside.replace(temporary)
        else:
            temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
