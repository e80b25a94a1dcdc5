"""Texts with a label: from rows to token ids and the number of the label, and these to tensors.

The model reads a text, or two that belong together, as its tokenizer dresses them, and a head on it chooses one of the
labels. A label is its name: 3 and "3" are the same one, whatever file it came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.batch import Batch, padded_tokens
from loratune.data.example import Example, Place
from loratune.data.messages import checked_text, kind
from loratune.data.render import Overlong, Rendered, RenderedCorpus
from loratune.data.shapes import Shape, text_of
from loratune.data.tokens import Encoder, Tokenizer
from loratune.errors import DataError, nearest

_BATCH = 512
_NUMBER = re.compile(r"-?[0-9]+")
_SHOWN = 8
# One number for each label: what a head chooses among.
Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Labelled(Rendered):
    """A row and the numbers of its labels.

    Args:
        targets: of each supervised token, or one of the whole where none is.
        types: of two texts, which one each token is of; empty where the tokenizer does not say.
    """

    targets: tuple[int, ...] = ()
    types: tuple[int, ...] = ()

    @property
    def units(self) -> int:
        return len(self.targets)

    @property
    def needed(self) -> int:
        return len(self.ids)

    def scored(self, number: int, width: int) -> NDArray[np.int64]:
        """Which of the model's outputs have targets, where this is row `number` of rows of `width` tokens."""
        return number * width + np.flatnonzero(self.supervised) if any(self.supervised) else np.array([number])


@dataclass(frozen=True, slots=True)
class LabelBatch(Batch):
    """Padded rows whose targets are labels: `scored` counts what the head gives, flattened but for the labels."""

    types: Tensor | None = None


# -- rows ----------------------------------------------------------------------------------------------------------


def _text_label(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    texts = [text_of(row, "text", problems)]
    if row.get("text_pair") is not None:
        texts.append(text_of(row, "text_pair", problems))
    if not problems and not all(text.strip() for text in texts):
        problems.append("row without a text: it is empty")
    label = label_of(row["label"], "column 'label'", problems)
    return Example(place, "labelled", texts=tuple(texts), labels=(label,))


def label_of(value: object, what: str, problems: list[str]) -> str:
    """The name of a label: a string as it is, a whole number as it is written."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with nulls in it became one of floats on the way
    if isinstance(value, bool) or not isinstance(value, str | int):
        shown = f"{value}" if isinstance(value, float) else kind(value)
        problems.append(f"{what} is {shown}, expected the name of a class or its whole number")
        return ""
    name = checked_text(str(value), what, problems).strip()
    if not name:
        problems.append(f"{what} is empty")
    return name


LABELLED = (Shape("text/label", ("text", "label"), ("text_pair",), _text_label),)


def label_names(examples: Iterable[Example]) -> Labels:
    """The labels of these rows, numbers in their order, else by the alphabet.

    Raises:
        DataError: there is one label only, so that nothing is to be told apart.
    """
    names = {label for example in examples for label in example.labels}
    if len(names) < 2:
        problem = f"all rows have the label {next(iter(names), '')!r}: there is nothing to tell apart"
        raise DataError(problem, hint="give rows of at least two classes")
    if all(_NUMBER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def only_held_out(train: Iterable[Example], val: Iterable[Example]) -> list[str]:
    """Labels of held-out rows that no training row has."""
    seen = {label for example in train for label in example.labels}
    return sorted({label for example in val for label in example.labels} - seen)


# -- token ids -----------------------------------------------------------------------------------------------------


def render_labelled(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    labels: Labels,
    max_length: int,
    overlong: Overlong = "error",
) -> RenderedCorpus:
    """Token ids of all examples, with the special tokens that the tokenizer puts around a text, and their labels.

    Args:
        labels: names by number.
        overlong: a longer row is an error, is dropped, or is truncated: the end of its longest text is cut.

    Raises:
        DataError: labels that are none of these, rows that are too long, or nothing left. All of them at once.
    """
    sorting = Sorting(tokenizer, labels, max_length, overlong)
    for some in in_batches(examples):
        for texts in (1, 2):
            alike = [example for example in some if len(example.texts) == texts]
            sorting.add(alike, encoded(tokenizer, alike))
    return sorting.finished()


class Sorting:
    """What becomes of the rows of a corpus with labels: kept, cut, dropped, or faults that are reported together."""

    def __init__(self, tokenizer: Tokenizer, labels: Labels, max_length: int, overlong: Overlong) -> None:
        self.tokenizer, self.max_length, self.overlong = tokenizer, max_length, overlong
        self.encoder = Encoder(tokenizer)
        self.labels = labels
        self.numbers = {name: number for number, name in enumerate(labels)}
        self.rows: list[Rendered] = []
        self.dropped: list[Place] = []
        self.special: list[Place] = []
        self.problems: list[tuple[Place, str]] = []
        self.hints: dict[str, None] = {}
        self.longest = 0

    def add(self, examples: Sequence[Example], encoded: Iterable[Mapping[str, Any]]) -> None:
        for example, made in zip(examples, encoded, strict=True):
            unknown = [label for label in dict.fromkeys(example.labels) if label not in self.numbers]
            for label in unknown:
                self.problems.append((example.place, f"label {label!r} is none of {self._named(label)}"))
                self.hints["correct the label, or train on rows that have it"] = None
            if any(self.encoder.spelled.search(text) for text in example.texts):
                self.special.append(example.place)
            if self._fits(example.place, len(made["input_ids"])) and not unknown:
                row = self.row(example, made)
                self.rows += [row] if row is not None else []

    def finished(self) -> RenderedCorpus:
        if self.problems:
            in_order = sorted(self.problems, key=lambda problem: problem[0].row)
            raise DataError([f"{place}: {reason}" for place, reason in in_order], hint="; ".join(self.hints))
        if not self.rows:
            reason = f"all {len(self.dropped)} rows are longer than {self.max_length} tokens and were dropped"
            raise DataError(reason if self.dropped else "no rows to read", hint="raise --max-length")
        rows = sorted(self.rows, key=lambda row: row.place.row)
        cut = tuple(row.place for row in rows if row.truncated)
        return RenderedCorpus(tuple(rows), tuple(self.dropped), cut, tuple(self.special))

    def _named(self, wrong: str) -> str:
        more = f" and {len(self.labels) - _SHOWN} more" if len(self.labels) > _SHOWN else ""
        return ", ".join(self.labels[:_SHOWN]) + more + nearest(wrong, self.labels)

    def _fits(self, place: Place, length: int) -> bool:
        """Whether the row is kept, as it is or cut."""
        if length <= self.max_length or self.overlong == "truncate":
            return True
        if self.overlong == "drop":
            self.dropped.append(place)
            return False
        self.longest = max(self.longest, length)
        self.problems.append((place, f"{length} tokens, longer than {self.max_length}"))
        self.hints["--overlong truncate or drop, or a larger --max-length where the model's context has room"] = None
        return False

    def row(self, example: Example, made: Mapping[str, Any]) -> Rendered | None:
        """The row, cut if it is longer than it may be; None after noting what is wrong with it."""
        cut = len(made["input_ids"]) > self.max_length
        if cut:
            (made,) = encoded(self.tokenizer, [example], truncation=True, max_length=self.max_length)
        ids, targets = tuple(made["input_ids"]), tuple(self.numbers[label] for label in example.labels)
        size = sum(map(len, example.texts))
        types = tuple(made["token_type_ids"]) if "token_type_ids" in made else ()
        return Labelled(ids, (False,) * len(ids), example.place, cut, size, targets, types)


def in_batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    rows = list(examples)
    yield from (rows[begin : begin + _BATCH] for begin in range(0, len(rows), _BATCH))


def encoded(tokenizer: Tokenizer, examples: Sequence[Example], **options: Any) -> list[dict[str, Any]]:
    """What the tokenizer makes of each row's one or two texts, which all rows have as many of."""
    if not examples:
        return []
    texts = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
    made = tokenizer(*texts, return_attention_mask=False, verbose=False, **options)
    return [{name: values[i] for name, values in made.items()} for i in range(len(examples))]


# -- tensors -------------------------------------------------------------------------------------------------------


def stack_labelled(rows: Sequence[Labelled], *, pad_id: int, starts: Sequence[int]) -> LabelBatch:
    """Rows below each other.

    Args:
        starts: index of each row's first token in the step's canonical order.
    """
    ids, positions, counters, mask = padded_tokens(rows, pad_id, starts)
    types = None
    if any(any(row.types) for row in rows):  # all zero is what a model takes where it is told nothing
        types = torch.zeros(ids.shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            types[number, : len(row.types)] = torch.tensor(row.types)
    return LabelBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=None,
        attention_mask=torch.from_numpy(mask),
        scored=torch.from_numpy(np.concatenate([row.scored(i, ids.shape[1]) for i, row in enumerate(rows)])),
        targets=torch.tensor([target for row in rows for target in row.targets]),
        tokens=torch.from_numpy(counters),
        examples=len(rows),
        computed_tokens=int(mask.sum()),
        types=types,
    )
