"""Any source of rows to one canonical corpus, or every reason why not.

read("train.jsonl") → Corpus          files: .jsonl .ndjson .json .csv .tsv .parquet .txt
read("owner/data-set")                the train split of a data set on the hub
read([{"prompt": …, "completion": …}, …])
read("questions.txt", answers=False)  rows to be answered, with or without the answer they expect
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from loratune.data.example import Corpus, Example, Place, hash_of
from loratune.data.files import read_csv, read_json, read_jsonl, read_lines, read_text
from loratune.data.messages import kind
from loratune.data.prompts import PROMPT_SHAPES
from loratune.data.shapes import SHAPES, Problem, Row, Shape, canonical_rows, convert, found_columns, recognise
from loratune.errors import DataError, MissingExtraError, nearest

if TYPE_CHECKING:
    import datasets

__all__ = ["Corpus", "Example", "Place", "read"]

Reader = Callable[[Path], tuple[list[Row], list[Problem]]]
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def read(
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | datasets.Dataset | Corpus,
    *,
    columns: Mapping[str, str] | None = None,
    answers: bool = True,
    shapes: Sequence[Shape] = SHAPES,
) -> Corpus:
    """The rows of `data` in canonical form.

    Files are JSONL, JSON (an array, or an object with one list of rows), CSV or TSV, Parquet, and plain text, where a
    row is a paragraph between blank lines: a paragraph is a unit of meaning, a line often is not, and a whole file
    rarely fits a model. A string that names no file is a data set on the hub, of which the split `train` is read.

    Args:
        columns: canonical name → name in the data, for example `{"prompt": "question", "completion": "answer"}`.
        answers: whether rows must have an answer. Without, they are prompts (`loratune.data.prompts` has their
            shapes): an answer at the end is what the row expects and never part of the prompt, a `text` is a prompt
            as a whole, and a row of a plain text file is a line, because questions are written one under the other;
            a prompt of several lines can be given as JSONL. A `Corpus` stays what it was read as.
        shapes: what rows with answers may be; those of a causal LM where nothing else is said.

    Raises:
        DataError: nothing to read, or rows that cannot be trained on or answered: all of them, each with its place and
            reason.
        ConfigError: `columns` names something that does not exist.
    """
    if isinstance(data, Corpus):
        return data
    shapes, readers = (shapes, _READERS) if answers else (PROMPT_SHAPES, _PROMPT_READERS)
    source, rows, problems = _rows(data, readers)
    if not rows and not problems:
        raise DataError(f"{source}: no rows", hint="give at least one row")
    columns = columns or {}
    if not rows:
        _refuse(problems)
    rows = canonical_rows(rows, columns, shapes)
    shape, strangers = recognise(rows, columns, shapes)
    skip = {place for place, _ in strangers}
    examples, faults = convert(shape, rows, skip)
    problems = problems + strangers + faults
    if problems:
        _refuse(problems)
    found = found_columns(rows)
    ignored = tuple(name for name in found if name not in shape.columns)
    used = tuple(name for name in found if name in shape.columns)
    return Corpus(tuple(examples), shape.name, source, hash_of(examples), ignored, used)


def _refuse(problems: Iterable[Problem]) -> NoReturn:
    in_order = sorted(problems, key=lambda problem: problem[0].row)
    raise DataError([f"{place}: {reason}" for place, reason in in_order], hint="correct or remove these rows")


def _rows(data: object, readers: Mapping[str, Reader]) -> tuple[str, list[Row], list[Problem]]:
    if isinstance(data, str | os.PathLike):
        path = Path(data).expanduser()
        if _exists(path) or not _may_be_hub_id(str(data)):
            return (str(path), *_file(path, readers))
        return str(data), *_hub(str(data))
    if _is_dataset(data):
        return "rows", *_arrow(cast("datasets.Dataset", data), "rows")
    if isinstance(data, Mapping):
        names = ", ".join(map(repr, list(data)[:8]))
        raise DataError(f"the data is one mapping with {names}", hint="give one of its splits, or a list of rows")
    if not isinstance(data, Sequence):
        raise DataError(f"the data is {kind(data)}, expected a path, a data set id or a list of rows")
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, row in enumerate(data, 1):
        if isinstance(row, Mapping):
            rows.append((Place("rows", number), row))
        else:
            problems.append((Place("rows", number), f"is {kind(row)}, expected a mapping"))
    return "rows", rows, problems


def _file(path: Path, readers: Mapping[str, Reader]) -> tuple[list[Row], list[Problem]]:
    if not _exists(path):
        shown = str(path)[:200]
        raise DataError(f"{shown}: no such file{nearest(path.name, _names_in(path.parent))}", hint="check the path")
    if path.is_dir():
        found = [name for name in _names_in(path) if Path(name).suffix.lower() in _READERS]
        raise DataError(
            f"{path}: is a folder", hint=f"name a data file: {', '.join(found[:8]) or 'there is none in it'}"
        )
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file type {path.suffix!r}", hint=f"known types: {', '.join(_READERS)}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty", hint="give at least one row")
        return reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", hint="check its permissions") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than a name can be, or with a null character: text instead of a path
        return False


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(child.name for child in folder.iterdir())
    except (OSError, ValueError):
        return []


def _jsonl(path: Path) -> tuple[list[Row], list[Problem]]:
    with path.open("rb") as handle:
        # A row is never a list, so a file that opens with a bracket is an array under another name.
        array = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return read_json(path) if array else read_jsonl(path)


def _parquet(path: Path) -> tuple[list[Row], list[Problem]]:
    _, arrow = _libraries()
    try:
        table = arrow.parquet.read_table(path)
    except arrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file: {reason}", hint="write it again") from None
    rows: list[Row] = []
    problems: list[Problem] = []
    number = 0
    for batch in table.to_batches(max_chunksize=1024):
        for row, faults in _rows_of_batch(batch):
            number += 1
            place = Place(path.name, number)
            problems += [(place, fault) for fault in faults]
            rows += [] if faults else [(place, _without_nulls(row))]
    return rows, problems


# What values raise that Arrow can hold and Python cannot: times out of range, text that is not UTF-8.
_NO_VALUE = (OverflowError, ValueError)


def _rows_of_batch(batch: Any) -> Iterable[tuple[dict[str, Any], list[str]]]:
    """Each row, and what of it cannot be read."""
    try:
        yield from ((row, []) for row in batch.to_pylist())
    except _NO_VALUE:
        for number in range(batch.num_rows):
            row, faults = {}, []
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    row[name] = column[number].as_py()
                except _NO_VALUE as error:
                    faults.append(f"{name!r} of type {column.type} cannot be read: {error}")
            yield row, faults


def _hub(name: str) -> tuple[list[Row], list[Problem]]:
    library, _ = _libraries()
    try:
        data = library.load_dataset(name, split="train")
    except Exception as error:  # noqa: BLE001 - what a loader raises depends on the hub, the network and the format
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{name}: neither a file here nor a data set that could be loaded from the hub: {reason[0]}",
            hint="check the name and the connection, or give a local file",
        ) from None
    return _arrow(data, name)


def _arrow(data: datasets.Dataset, name: str) -> tuple[list[Row], list[Problem]]:
    inner = {column: getattr(feature, "feature", feature) for column, feature in data.features.items()}
    labels = {column: feature for column, feature in inner.items() if hasattr(feature, "int2str")}
    rows: list[Row] = []
    try:
        for number, row in enumerate(data.with_format(None), 1):
            named = {
                column: _label(labels[column], value) if column in labels else value for column, value in row.items()
            }
            rows.append((Place(name, number), _without_nulls(named)))
    except _NO_VALUE as error:
        hint = "leave out the column with that value"
        raise DataError(f"{Place(name, len(rows) + 1)}: cannot be read: {error}", hint=hint) from None
    return rows, []


def _label(feature: Any, value: object) -> object:
    if isinstance(value, list):
        return [_label(feature, one) for one in value]
    # Unlabelled rows carry -1 there.
    return feature.int2str(value) if isinstance(value, int) and value >= 0 else None


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the nulls below its columns.

    Arrow gives every nested object the keys of all objects in that column, as nulls: tool schemas and messages would
    otherwise be rendered with keys that nobody wrote.
    """
    return {name: _pruned(value) for name, value in row.items()}


def _pruned(value: object) -> object:
    if isinstance(value, dict):
        return {name: _pruned(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    return value


def _may_be_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and Path(name).suffix.lower() not in _READERS and not name.startswith(".")


def _is_dataset(data: object) -> bool:
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, module.Dataset)


def _libraries() -> tuple[Any, Any]:
    try:
        import datasets
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is needed to read this source", hint="pip install datasets") from None
    return datasets, pa


_READERS: Mapping[str, Reader] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": _parquet,
    ".txt": read_text,
}
_PROMPT_READERS: Mapping[str, Reader] = {
    **_READERS,
    ".json": partial(read_json, shapes=PROMPT_SHAPES),
    ".txt": read_lines,
}
