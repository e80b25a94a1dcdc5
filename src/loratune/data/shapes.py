"""Which columns make which kind of example.

| shape | columns | becomes |
|---|---|---|
| `messages` | messages, tools? | chat |
| `conversations` | conversations, tools? (ShareGPT: `from`, `value`) | chat |
| `prompt/completion` | prompt, completion: strings, or both lists of messages | pair, or chat |
| `instruction/output` | instruction, input?, output (Alpaca) | pair |
| `text/label` | text, label | pair: the label is the answer |
| `text` | text | text |
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratune.data.example import Example, Place
from loratune.data.messages import check_conversation, checked_text, conversation, kind, tools
from loratune.errors import ConfigError, DataError, nearest

Row = tuple[Place, Mapping[str, Any]]
Problem = tuple[Place, str]


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Place, Mapping[str, Any], list[str]], Example]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.required + self.optional

    def fits(self, columns: Iterable[str]) -> bool:
        return set(self.required) <= set(columns)


def _messages(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    column = "messages" if "messages" in row else "conversations"
    messages = conversation(row[column], column, problems)
    check_conversation(messages, problems)
    return Example(place, "chat", messages=messages, tools=tools(row.get("tools"), problems))


def prompt_completion(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    lists = [isinstance(row[name], list | tuple) for name in ("prompt", "completion")]
    if all(lists):
        # The prompt is what the row answers, also where it has earlier answers in it.
        prompt = conversation(row["prompt"], "prompt", problems)
        context = tuple(message | {"weight": 0} if message["role"] == "assistant" else message for message in prompt)
        messages = context + conversation(row["completion"], "completion", problems)
        check_conversation(messages, problems)
        return Example(place, "chat", messages=messages, tools=tools(row.get("tools"), problems))
    if any(lists):
        problems.append("'prompt' and 'completion' must be both strings or both lists of messages")
        return Example(place, "pair")
    return pair(place, text_of(row, "prompt", problems), text_of(row, "completion", problems), "", problems)


def instruction_output(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    return pair(place, instruction_prompt(row, problems), text_of(row, "output", problems), "\n\n", problems)


def instruction_prompt(row: Mapping[str, Any], problems: list[str]) -> str:
    parts = [text_of(row, "instruction", problems)]
    if row.get("input") is not None:
        parts.append(text_of(row, "input", problems))
    return "\n\n".join(part for part in parts if part.strip())


def text_label(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    label = row["label"]
    if not isinstance(label, str | int | float):
        problems.append(f"column 'label' is {kind(label)}, expected a string or a number")
        label = " "
    answer = label if isinstance(label, str) else json.dumps(label)
    return pair(place, text_of(row, "text", problems), checked_text(answer, "label", problems), "\n", problems)


def _plain(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    text = text_of(row, "text", problems)
    if not problems and not text.strip():
        problems.append("column 'text' is empty")
    return Example(place, "text", text=text)


def pair(place: Place, prompt: str, completion: str | None, separator: str, problems: list[str]) -> Example:
    """A question and its answer; `completion` is None where none is expected."""
    if not problems:
        if not prompt.strip():
            problems.append("row without a question: the prompt is empty")
        if completion is not None and not completion.strip():
            problems.append("row without an answer: the completion is empty")
    answered = completion is not None
    return Example(place, "pair", prompt=prompt, completion=completion or "", separator=separator, answered=answered)


def text_of(row: Mapping[str, Any], column: str, problems: list[str]) -> str:
    value = row[column]
    if isinstance(value, str):
        return checked_text(value, f"column {column!r}", problems)
    problems.append(f"column {column!r} is {kind(value)}, expected a string")
    return ""


# In order of preference: many data sets carry a flattened copy of the conversation in another column.
SHAPES = (
    Shape("messages", ("messages",), ("tools",), _messages),
    Shape("conversations", ("conversations",), ("tools",), _messages),
    Shape("prompt/completion", ("prompt", "completion"), ("tools",), prompt_completion),
    Shape("instruction/output", ("instruction", "output"), ("input",), instruction_output),
    Shape("text/label", ("text", "label"), (), text_label),
    Shape("text", ("text",), (), _plain),
)
# What other data sets call them, for the hint only: a name is never mapped without being asked for.
_SYNONYMS = {
    "messages": ("dialog", "dialogue", "conversation", "chat", "turns", "message"),
    "prompt": ("question", "query", "input", "instruction", "source", "user", "context"),
    "completion": ("answer", "response", "output", "target", "reply", "assistant", "chosen"),
    "text": ("content", "document", "body", "sentence", "story", "passage"),
    "anchor": ("question", "sentence1", "source", "premise"),
    "positive": ("answer", "passage", "document", "sentence2", "context", "target", "hypothesis"),
    "context": ("passage", "paragraph", "document", "text"),
    "tokens": ("words", "sentence_words"),
    "tags": ("labels", "tag", "pos_tags", "ner", "pos"),
    "label": ("labels", "class", "category", "target", "sentiment", "intent", "topic", "coarse_label"),
}


def columns_of(shapes: Iterable[Shape]) -> tuple[str, ...]:
    """The columns that these shapes know, each once."""
    return tuple(dict.fromkeys(column for shape in shapes for column in shape.columns))


def canonical_rows(rows: Sequence[Row], columns: Mapping[str, str], shapes: Sequence[Shape] = SHAPES) -> list[Row]:
    """The rows with `columns` (canonical name → name in the data) applied.

    Raises:
        ConfigError: a canonical name that does not exist, a column that no row has, or one column named twice.
    """
    if not columns:
        return list(rows)
    found, known = found_columns(rows), columns_of(shapes)
    foreign = [name for name in columns if name not in known]
    absent = [name for name in columns.values() if name not in found]
    problems = [f"columns: {name!r} is not a column of any shape{nearest(name, known)}" for name in foreign]
    problems += [f"columns: no row has a column {name!r}{nearest(name, found)}" for name in absent]
    twice = [name for name, count in Counter(columns.values()).items() if count > 1]
    problems += [f"columns: {name!r} is mapped twice" for name in twice]
    if problems:
        raise ConfigError(problems, hint=f"the data has {_listed(found)}; shapes know {_listed(known)}")
    taken = set(columns.values())
    back = {actual: name for name, actual in columns.items()}
    return [
        (
            place,
            {back.get(name, name): value for name, value in row.items() if name in taken or name not in columns},
        )
        for place, row in rows
    ]


def recognise(
    rows: Sequence[Row], columns: Mapping[str, str], shapes: Sequence[Shape] = SHAPES
) -> tuple[Shape, list[Problem]]:
    """The shape of most rows, and a problem for each row of another one.

    Args:
        rows: canonical rows, at least one.
        columns: the mapping that was asked for; a shape that uses all of it is preferred.

    Raises:
        DataError: no row has a known shape.
    """
    preferred = sorted(shapes, key=lambda shape: not set(columns) <= set(shape.columns))
    known: dict[frozenset[str], Shape | None] = {}
    each: list[Shape | None] = []
    for _, row in rows:
        names = frozenset(row)
        if names not in known:
            known[names] = next((shape for shape in preferred if shape.fits(names)), None)
        each.append(known[names])
    counts = Counter(shape.name for shape in each if shape)
    if not counts:
        raise _unknown(found_columns(rows), rows[0][0].file, shapes)
    name = counts.most_common(1)[0][0]
    shape = next(shape for shape in shapes if shape.name == name)
    pairs = zip(rows, each, strict=True)
    return shape, [(place, _stranger(row, shape, other)) for (place, row), other in pairs if other is not shape]


def convert(shape: Shape, rows: Sequence[Row], skip: set[Place]) -> tuple[list[Example], list[Problem]]:
    """The rows of `shape` as examples, and what is wrong with them; rows in `skip` are passed over."""
    examples: list[Example] = []
    problems: list[Problem] = []
    for place, row in rows:
        if place in skip:
            continue
        faults: list[str] = []
        example = shape.convert(place, row, faults)
        if "id" in shape.columns:
            example = replace(example, id=_id(row.get("id"), faults))
        examples.append(example)
        problems += [(place, fault) for fault in faults]
    return examples, problems


def _id(value: object, problems: list[str]) -> str | int | None:
    if isinstance(value, str):
        return checked_text(value, "column 'id'", problems)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def found_columns(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(sorted({str(name) for _, row in rows for name in row}))


def _stranger(row: Mapping[str, Any], shape: Shape, other: Shape | None) -> str:
    missing = [name for name in shape.required if name not in row]
    if missing:
        own = _listed(sorted(map(str, row)))
        return f"has no {_listed(missing)}, which the other rows have ({shape.name}); it has {own}"
    assert other is not None
    extra = [name for name in other.required if name not in shape.columns]
    return f"is {other.name}, the other rows are {shape.name}: it also has {_listed(extra)}"


def _unknown(found: Sequence[str], file: str, shapes: Sequence[Shape]) -> DataError:
    known = "; ".join(" + ".join(shape.required) for shape in shapes)
    problem = f"{file}: no known shape has the columns {_listed(found)}; known shapes: {known}"
    mapping = suggestion(found, shapes)
    return DataError(problem, hint=f"name them: --columns {mapping}")


def suggestion(found: Sequence[str], shapes: Sequence[Shape] = SHAPES) -> str:
    """The mapping that the column names suggest, as `prompt=question,completion=answer`."""
    lower = {name.lower(): name for name in reversed(found)}
    guess: dict[str, str] = {}
    for canonical in columns_of(shapes):
        names = (canonical, *_SYNONYMS.get(canonical, ()))
        close = [lower[name] for name in names if name in lower]
        close = close or difflib.get_close_matches(canonical, found, n=1, cutoff=0.75)
        guess |= {canonical: close[0]} if close and close[0] not in guess.values() else {}
    for shape in shapes:
        if shape.fits(guess):
            return ",".join(f"{name}={guess[name]}" for name in shape.required if guess[name] != name) or "prompt=…"
    fewest = min(shapes, key=lambda shape: len(shape.required)) if shapes is not SHAPES else shapes[2]
    return ",".join(f"{name}=…" for name in fewest.required)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"
