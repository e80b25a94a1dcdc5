"""What a container lets its processes have of the machine's memory: Linux' control groups, of both versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class _Files(NamedTuple):
    """Names of the files of one version: what may be used, what is, and of it what is given up when it is needed."""

    limit: str
    usage: str
    cached: str


_FIRST = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = _Files("memory.max", "memory.current", "inactive_file")


class Allowance(NamedTuple):
    """In bytes: what the process may have at most, and what is left of it."""

    total: int
    left: int


def allowance(groups: Path = _GROUPS, own: Path = _OWN) -> Allowance | None:
    """The tightest of the groups in which this process is; None where nothing limits it, and on other systems."""
    found = [one for folder, files in _groups(groups, own) if (one := _allowed(folder, files)) is not None]
    if not found:
        return None
    return Allowance(min(one.total for one in found), min(one.left for one in found))


def _groups(groups: Path, own: Path) -> Iterator[tuple[Path, _Files]]:
    """The process's own group and those around it; inside a container its own is often the outermost that is seen."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0" and not kinds:
            root, files = groups, _SECOND
        elif "memory" in kinds.split(","):
            root, files = groups / "memory", _FIRST
        else:
            continue
        inside = Path(path.lstrip("/"))
        yield from ((root / part, files) for part in (inside, *inside.parents))


def _allowed(folder: Path, files: _Files) -> Allowance | None:
    try:
        limit = (folder / files.limit).read_text().strip()
        used = int((folder / files.usage).read_text())
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = next((int(value) for name, value in pairs if name == files.cached), 0)
    except (OSError, ValueError):
        return None
    if not limit.isdigit():  # "max"
        return None
    return Allowance(int(limit), max(0, int(limit) - used + min(cached, used)))
