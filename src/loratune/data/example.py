"""One canonical row, whatever file and shape it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row came from; `str()` gives `train.jsonl:419`.

    `row` counts from 1: a line number in JSONL, CSV and text files, a row number in JSON arrays, Parquet,
    hub data sets and rows in memory.
    """

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Example:
    """One row.

    Args:
        kind: `chat` uses `messages` (and `tools`), `pair` uses `prompt` and `completion`, `text` uses `text`;
            `labelled` and `tagged` use `texts` and `labels`, `matched` uses `texts`, `located` `texts` and `spans`.
        messages: each with `role` and `content` (strings), and what else the row said (`tool_calls`, `name`, …). An
            assistant message with `weight` 0 is context: it is never supervised.
        separator: stands between prompt and completion where no chat template separates them.
        answered: whether the row has an answer; where it has none, all of it is the prompt of an answer to come.
        id: what a row read as a prompt calls itself.
        texts: what is read: one text, or two that belong together; of a tagged row, its words.
        labels: a label of the whole; of a tagged row, one of each word.
        spans: of a located row, the characters of its second text that answer its first one; none where none do.
    """

    place: Place
    kind: Literal["chat", "pair", "text", "labelled", "tagged", "matched", "located"]
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None
    prompt: str = ""
    completion: str = ""
    text: str = ""
    separator: str = ""
    answered: bool = True
    id: str | int | None = None
    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Corpus:
    """The rows of one source.

    Args:
        shape: name of the recognised shape, for example `messages` or `prompt/completion`.
        source: the file, data set id or `rows` that was read.
        sha256: of the canonical content in order, without places: the same in every process and for every file format.
        columns, ignored_columns: those that the shape uses, and those that it does not, sorted.
    """

    examples: tuple[Example, ...]
    shape: str
    source: str
    sha256: str
    ignored_columns: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)


def content_of(example: Example) -> bytes:
    """The row's content as canonical JSON: equal bytes mean equal rows, wherever they stand.

    Keys keep their order: a template prints a tool's schema in the order it was written.
    """
    content = [
        example.kind,
        example.messages,
        example.tools,
        example.prompt,
        example.separator,
        example.completion,
        example.text,
        # Rows without them keep the bytes, and hashes, that they had before there were labels.
        *([example.texts, example.labels] if example.texts else []),
        *([example.spans] if example.spans else []),
    ]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return text.encode("utf-8", "surrogatepass")


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(value)


def hash_of(examples: Iterable[Example]) -> str:
    """sha256 (hex) of all that is computed from: content in order, and which rows have no answer to compare with.

    Not of what rows call themselves (`place`, `id`).
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(content_of(example))
        if not example.answered:
            digest.update(b"unanswered")  # no end of JSON, so that no other row's content is taken for it
    return digest.hexdigest()
