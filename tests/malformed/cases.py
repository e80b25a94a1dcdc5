"""One malformed thing, and what must become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.errors import LoratuneError

# A file or folder made in the folder given.
Make = Callable[[Path], Path]
# The fixture `counted` of tests/conftest.py.
Counted = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """What is made, and what must come of reading it.

    Attributes:
        make: writes it and gives its path.
        named: what the error must say beside the path; not looked at where it is accepted.
        result: what reading it must give, or `REFUSED`.
    """

    name: str
    make: Make
    named: tuple[str, ...] = field(default=())
    result: Any = None

    def __str__(self) -> str:
        return self.name


REFUSED = object()


def outcome(case: Case, path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` gave, or `REFUSED` where it raised an error of ours that names the thing and the place in it."""
    try:
        return read(path)
    except LoratuneError as error:
        said = str(error)
    assert len(said) < 20_000, f"{len(said):,} characters"
    missing = [word for word in (path.name[:40], *case.named) if word not in said]
    assert not missing, f"{missing} is not in {said!r}"
    return REFUSED


def changed(name: str, folder: str, change: Callable[[Path], object], *named: str) -> Case:
    """The sound thing that stands in this folder, changed so that it must be refused."""

    def make(place: Path) -> Path:
        change(place / folder)
        return place / folder

    return Case(name, make, named, REFUSED)


def written(name: str, content: bytes | str) -> Make:
    """A file of this name."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make
