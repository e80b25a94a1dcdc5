"""Files with a JSON object on each line, which a kill may have cut off in its last one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from loratune.report.decode import decode

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line(Generic[T]):
    """A line as it stands in its file, what it holds, and what of that this loratune knows."""

    number: int
    text: bytes
    content: Any
    value: T


@dataclass(frozen=True, slots=True)
class Lines(Generic[T]):
    """`is_cut`: the last line is half-written, and not among them."""

    lines: tuple[Line[T], ...]
    is_cut: bool


def read_lines(path: Path, kind: type[T], problems: list[str]) -> Lines[T]:
    """A value of the dataclass `kind` for each line that is not blank; a problem names the line that it is in.

    A last line without its end may be a broken one.
    """
    *whole, rest = path.read_bytes().split(b"\n")
    half: list[str] = []
    contents = [(n, text, parse(text, f"{path.name}:{n}", problems)) for n, text in enumerate(whole, 1) if text.strip()]
    if rest.strip():
        contents.append((len(whole) + 1, rest, parse(rest, path.name, half)))
    found = [
        Line(number, text, content, decode(kind, content, f"{path.name}:{number}", problems))
        for number, text, content in contents
        if content is not BROKEN
    ]
    return Lines(tuple(found), is_cut=bool(half))


BROKEN = object()


def parse(content: bytes, place: str, problems: list[str]) -> Any:
    """What the JSON says; `BROKEN`, and one more problem, where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # bad syntax, bad UTF-8, an endless number; endless nesting
        problems.append(f"{place} is not JSON: {error}")
        return BROKEN
