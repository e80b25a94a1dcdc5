"""JSONL, JSON, CSV and text files to rows, by line.

Files are read here rather than by a table library because a bad row must be named by its line, and because those
libraries guess types, merge the keys of all rows and skip what they cannot read.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from loratune.data.example import Place
from loratune.data.messages import kind
from loratune.data.shapes import SHAPES, Problem, Row, Shape
from loratune.errors import DataError

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"[ \t\r\n]*")


class StrictJson:
    """A decoder that reports what the standard one accepts silently: repeated keys (the last would win) and NaN."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def next_value(self, text: str, at: int) -> tuple[Any, int]:
        """The value that starts at `at` and where it ends. Raises `json.JSONDecodeError`."""
        try:
            value, end = self._decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, at) from None
        except ValueError as error:
            raise json.JSONDecodeError(str(error), text, at) from None
        return value, end

    def taken_faults(self) -> list[str]:
        """What was found since the last call."""
        faults, self.faults = self.faults, []
        return faults

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self.faults += [f"duplicate key {name!r}" for name in found if names.count(name) > 1]
        return found

    def _constant(self, name: str) -> None:
        self.faults.append(f"{name} is not JSON")


def read_jsonl(path: Path) -> tuple[list[Row], list[Problem]]:
    """One object a line; empty lines are skipped."""
    rows: list[Row] = []
    problems: list[Problem] = []
    strict = StrictJson()
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            place = Place(path.name, number)
            line = raw.removeprefix(_BOM) if number == 1 else raw
            _refuse_utf16(path, line if number == 1 else b"")
            try:
                text = line.decode("utf-8").strip(" \t\r\n")
                value, end = strict.next_value(text, 0) if text else ({}, 0)
            except UnicodeDecodeError as error:
                problems.append((place, _not_utf8(error)))
                continue
            except json.JSONDecodeError as error:
                problems.append((place, f"not valid JSON: {error.msg} at column {error.pos + 1}"))
                strict.taken_faults()
                continue
            if not text:
                continue
            faults = strict.taken_faults()
            if end < len(text):
                faults.append(f"text after the end of the object, at column {_past_space(text, end) + 1}")
            elif not isinstance(value, dict):
                faults.append(f"is {kind(value)}, expected an object")
            problems += [(place, fault) for fault in faults]
            if not faults:
                rows.append((place, value))
    return rows, problems


def read_json(path: Path, shapes: Sequence[Shape] = SHAPES) -> tuple[list[Row], list[Problem]]:
    """An array of objects, an object that holds one such array, or one object a line under another name.

    An object that has the columns of one of `shapes` is a row itself.

    Raises:
        DataError: the file as a whole is not valid JSON, or it is not clear where its rows are.
    """
    text = _decoded(path)
    start = _past_space(text, 0)
    if text.startswith("[", start):
        rows, problems, end = _array(text, start, path)
        _expect_end(text, end, path)
        return rows, problems
    strict = StrictJson()
    try:
        value, end = strict.next_value(text, start)
    except json.JSONDecodeError as error:
        _refuse_json(path, error)
    if _past_space(text, end) < len(text):
        return read_jsonl(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: is {kind(value)}, expected an array of objects", hint="write one object for each row")
    if any(shape.fits(value) for shape in shapes):
        place = Place(path.name, 1)
        faults = strict.taken_faults()
        return ([] if faults else [(place, value)]), [(place, fault) for fault in faults]
    return _wrapped(text, start, value, path)


def _wrapped(text: str, start: int, value: Mapping[str, Any], path: Path) -> tuple[list[Row], list[Problem]]:
    lists = [name for name, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) != 1:
        found = ", ".join(map(repr, lists or value)) or "nothing"
        raise DataError(
            f"{path}: an object with {found}: {'more than one list' if lists else 'no list'} of rows",
            hint="write an array of objects, or JSONL with one object a line",
        )
    taken: list[tuple[list[Row], list[Problem]]] = []
    strict = StrictJson()
    at = _past_space(text, start + 1)
    while True:
        name, at = strict.next_value(text, at)
        at = _past_space(text, _past_space(text, at) + 1)
        if name == lists[0]:
            if taken:
                hint = "one list holds all rows"
                raise DataError(f"{path}: {name!r} comes more than once: which of its lists counts?", hint=hint)
            rows, problems, at = _array(text, at, path)
            taken.append((rows, problems))
        else:
            _, at = strict.next_value(text, at)
        at = _past_space(text, at)
        if text[at] == "}":
            return taken[0]
        at = _past_space(text, at + 1)


def _array(text: str, start: int, path: Path) -> tuple[list[Row], list[Problem], int]:
    """Rows, problems and the end of the array that opens at `start`, element by element so that each has a number."""
    rows: list[Row] = []
    problems: list[Problem] = []
    strict = StrictJson()
    at = _past_space(text, start + 1)
    if text.startswith("]", at):
        return rows, problems, at + 1
    for number in range(1, sys.maxsize):
        place = Place(path.name, number)
        try:
            value, at = strict.next_value(text, at)
            at = _past_space(text, at)
            if text[at : at + 1] not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except json.JSONDecodeError as error:
            _refuse_json(path, error, number)
        faults = strict.taken_faults()
        if not isinstance(value, dict):
            faults.append(f"is {kind(value)}, expected an object")
        problems += [(place, fault) for fault in faults]
        if not faults:
            rows.append((place, value))
        if text[at] == "]":
            break
        at = _past_space(text, at + 1)
    return rows, problems, at + 1


def read_csv(path: Path) -> tuple[list[Row], list[Problem]]:
    """A header line and one record a row; the place is the line on which a record starts.

    The separator is a comma, or a tab or semicolon where the header has no comma.

    Raises:
        DataError: no header, a repeated column, or broken quoting.
    """
    text = _decoded(path)
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = "," if "," in header else next((mark for mark in "\t;" if mark in header), ",")
    records = _records(path, text, delimiter)
    try:
        _, names = next(records)
    except StopIteration:
        return [], []
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError([f"{path}: column {name!r} appears twice in the header" for name in twice], hint="rename one")
    rows: list[Row] = []
    problems: list[Problem] = []
    for place, fields in records:
        if len(fields) != len(names):
            problems.append((place, f"has {len(fields)} fields, the header has {len(names)}"))
        else:
            rows.append((place, dict(zip(names, fields, strict=True))))
    return rows, problems


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[Place, list[str]]]:
    # The limit is a setting of the whole process: long documents need a higher one, others must not notice.
    before = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        records, start = [], 1
        try:
            for fields in reader:
                if fields:
                    records.append((Place(path.name, start), fields))
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}: not valid CSV: {error}", hint='put " around fields with separators, double it inside'
            ) from None
    finally:
        csv.field_size_limit(before)
    yield from records


def read_text(path: Path) -> tuple[list[Row], list[Problem]]:
    """Paragraphs separated by blank lines, each a `text` row; the place is a paragraph's first line."""
    rows: list[Row] = []
    lines: list[str] = []
    for number, line in enumerate([*_decoded(path).replace("\r\n", "\n").split("\n"), ""], 1):
        if line.strip():
            lines.append(line)
        elif lines:
            rows.append((Place(path.name, number - len(lines)), {"text": "\n".join(lines)}))
            lines = []
    return rows, []


def read_lines(path: Path) -> tuple[list[Row], list[Problem]]:
    """Lines that are not blank, each a `text` row."""
    lines = _decoded(path).replace("\r\n", "\n").split("\n")
    return [(Place(path.name, number), {"text": line}) for number, line in enumerate(lines, 1) if line.strip()], []


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    _refuse_utf16(path, data)
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name}:{line}: {_not_utf8(error)}", hint="save the file as UTF-8") from None


def _refuse_utf16(path: Path, start: bytes) -> None:
    if start.startswith(_UTF16):
        raise DataError(f"{path}: the file is UTF-16", hint="save the file as UTF-8")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x})"


def _past_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect_end(text: str, end: int, path: Path) -> None:
    end = _past_space(text, end)
    if end < len(text):
        _refuse_json(path, json.JSONDecodeError("text after the end of the array", text, end))


def _refuse_json(path: Path, error: json.JSONDecodeError, row: int | None = None) -> NoReturn:
    within = f" (row {row})" if row else ""
    raise DataError(
        f"{path.name}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}{within}",
        hint="JSONL, one object a line, lets every bad row be named",
    ) from None
