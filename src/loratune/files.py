"""The one place that writes files: to a temporary name, flushed to the disk, then renamed.

A kill at any moment leaves the old content or the new one. Several files that belong together are first completed
in a folder of their own. Where nothing else lies in the target, that folder takes its place in one step, so that every
reader sees one set or the other. Elsewhere the files move in one by one, and `finish` ends what a kill interrupted.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_STAGED = ".staged"
_COMMITTED = ".committed"
_OLD = ".old"
# How Rust, in which safetensors is written, ends the message of what the system refused.
_REFUSED_IN_RUST = re.compile(r"\(os error (\d+)\)")
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
# Of renameat2 (linux/fs.h, fcntl.h) and of renamex_np (macOS, sys/stdio.h).
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_RENAME_SWAP = 2


def cache_folder() -> Path:
    """Where what was made once for all runs of a user is kept: LORATUNE_CACHE, or `loratune` in the user's cache."""
    root = os.environ.get("LORATUNE_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "loratune"


def to_json(value: Any) -> bytes:
    """JSON as this project writes it: indent 2, sorted keys, a final newline, no NaN."""
    return _in_utf8(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def to_json_lines(values: Iterable[Any]) -> bytes:
    return _in_utf8("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def _in_utf8(text: str) -> bytes:
    """JSON as bytes; what UTF-8 has none for (names of files that are not UTF-8 have it) comes as JSON's escape."""
    return text.encode(errors="backslashreplace")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, atomically."""
    temporary = _temporary(path)
    try:
        with _system_errors(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether this is something half-written, by its name."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Drop what processes that are no more left half-written here: for who is about to write, and alone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        named = _TEMPORARY.fullmatch(path.name)
        # In a container every process may have the number that the killed one had.
        if named and (int(named[1]) == os.getpid() or not _lives(int(named[1]))):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no process's number at all
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, to_json(value))


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; the system lets go of it when the process ends, however it ends.

    Args:
        wait: until nobody else holds it. Who held it takes the file away: look again whether there is something to do.

    Raises:
        BlockingIOError: another process holds it, and `wait` was not said.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log and hand it to the operating system, so that a killed process has written it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files of a folder so that all are the old ones or all the new ones.

    After a kill any reader finds one set or the other where the folder held nothing else than such files; where it
    holds more, or cannot be exchanged, that is so after `recover`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    if not _in_one_step(folder, contents):
        _one_by_one(folder, contents)


def _in_one_step(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Put a new folder with these files in the place of `folder`; False, and nothing changed, where that cannot be."""
    exists = os.path.lexists(folder)
    if exists and not _can_be_exchanged(folder, contents):
        return False
    beside = folder.parent / f".{folder.name}.{os.getpid()}{_STAGED}"
    try:
        beside.mkdir()
    except OSError:  # a parent that is not ours, say, where the folder itself is
        return False
    try:
        if exists:
            # Modes, and the access lists that the files inherit, before there are files.
            shutil.copystat(folder, beside)
            if not _same_access(folder, beside):
                return False
        for name, content in contents.items():
            write_bytes(beside / name, content)
        if not exists:
            beside.replace(folder)
        elif not _exchange(beside, folder):
            return False
        _sync_folder(folder.parent)
        if exists:
            _keep_newcomers(beside, folder, contents)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


def _can_be_exchanged(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Whether the folder is one that we may write to and holds no more than the old state of these files.

    Where this process works in it, paths relative to it would lead into the folder that is deleted.
    """
    if folder.is_symlink() or not folder.is_dir() or not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return False
    if os.path.samestat(folder.stat(), Path().stat()):
        return False
    return all(path.name in contents and path.is_file() for path in folder.iterdir())


def _same_access(a: Path, b: Path) -> bool:
    x, y = a.stat(), b.stat()
    return (x.st_uid, x.st_gid, x.st_mode) == (y.st_uid, y.st_gid, y.st_mode)


def _exchange(a: Path, b: Path) -> bool:
    """Give each of two folders the other's name in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None)
    paths = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin":
        return hasattr(libc, "renamex_np") and bool(libc.renamex_np(*paths, _RENAME_SWAP) == 0)
    if not hasattr(libc, "renameat2"):
        return False
    return bool(libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def _keep_newcomers(old: Path, folder: Path, contents: Mapping[str, bytes]) -> None:
    """What somebody else put into the old folder while the new one was written moves on."""
    for path in old.iterdir():
        if path.name not in contents:
            path.replace(folder / path.name)


def _one_by_one(folder: Path, contents: Mapping[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    staged = folder / _STAGED
    staged.mkdir()
    for name, content in contents.items():
        write_bytes(staged / name, content)
    staged.replace(folder / _COMMITTED)
    _sync_folder(folder)
    recover(folder)


def recover(folder: Path) -> None:
    """`finish`, and drop an incomplete or replaced set: for who writes here, since it may be another writer's."""
    finish(folder)
    shutil.rmtree(folder / _STAGED, ignore_errors=True)
    for beside in _made_for(folder, _STAGED):
        shutil.rmtree(beside, ignore_errors=True)


def _made_for(folder: Path, end: str) -> list[Path]:
    """What writers left beside a folder: by the number of their process, since anything else is somebody's own."""
    ours = re.compile(rf"\.{re.escape(folder.name)}\.\d+{re.escape(end)}")
    found = folder.parent.glob(f".{glob.escape(folder.name)}.*{end}")
    return sorted(path for path in found if ours.fullmatch(path.name))


def finish(folder: Path) -> None:
    """Finish what was killed: a complete set moves in, a folder that was moved aside comes back."""
    if not folder.exists():
        for aside in _made_for(folder, _OLD)[:1]:
            aside.replace(folder)
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

    An existing `path` is replaced in one step, or, where that cannot be, moved aside first: then a kill leaves the new
    one complete or, after `recover`, the old one, never half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _system_errors(path):
            yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        _sync_folder(temporary)
        if not path.exists():
            temporary.replace(path)
        elif not _exchange(temporary, path):
            aside = path.with_name(f".{path.name}.{os.getpid()}{_OLD}")
            path.replace(aside)
            temporary.replace(path)
            # Under this name no `recover` takes what is left of it for the old folder.
            aside.replace(temporary)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """What the system refuses is an OSError with its number and place, whatever a library makes of it."""
    try:
        yield
    except Exception as error:
        refused = _REFUSED_IN_RUST.search(str(error))
        if isinstance(error, OSError):
            if error.filename is not None:
                raise
            # numpy has no number either: 800 requested and 496 written.
            number, said = error.errno or errno.EIO, error.strerror or str(error)
        elif refused is not None:
            number, said = int(refused[1]), os.strerror(int(refused[1]))
        else:
            raise
        raise OSError(number, said, str(path)) from error


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
