"""Pairs of texts that belong together: from rows to token ids, and these to tensors.

What a pair teaches is that its second text is nearer to the first than the second texts of all other rows of the step
are. So a step's rows cannot be told apart from each other: they make one batch, of which the model may be given a few
texts at a time (`at_once`), and no split changes what they are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loratune.data.batch import Batch, padded_tokens
from loratune.data.example import Example, Place
from loratune.data.labelled import Labelled, Sorting, encoded, in_batches
from loratune.data.render import Overlong, Rendered, RenderedCorpus
from loratune.data.shapes import Shape, text_of
from loratune.data.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class TwoTexts(Rendered):
    """Two texts one after the other; the second one begins at `border`."""

    border: int = 0

    @property
    def needed(self) -> int:
        return len(self.ids)

    @property
    def asked(self) -> tuple[int, ...]:
        return self.ids[: self.border]

    @property
    def match(self) -> tuple[int, ...]:
        return self.ids[self.border :]


@dataclass(frozen=True, slots=True)
class Matched(TwoTexts):
    """Two texts that belong together, which is one thing to learn."""

    @property
    def units(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class MatchBatch(Batch):
    """The first texts of N rows, and below them their second ones.

    Attributes:
        same: bool (N, N), whether another row's second text is equal to this row's: it is no wrong answer.
        at_once: tokens, pads included, that go through the model together; 0 for all.
    """

    same: Tensor | None = None
    at_once: int = 0


def _pair(place: Place, row: Mapping[str, Any], problems: list[str], first: str) -> Example:
    texts = tuple(text_of(row, name, problems) for name in (first, "positive"))
    if not problems:
        empty = [name for name, text in zip((first, "positive"), texts, strict=True) if not text.strip()]
        problems += [f"column {name!r} is empty" for name in empty]
    return Example(place, "matched", texts=texts)


def _shape(first: str) -> Shape:
    return Shape(
        f"{first}/positive", (first, "positive"), (), lambda place, row, problems: _pair(place, row, problems, first)
    )


MATCHED = (_shape("anchor"), _shape("query"))


def render_matched(
    examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int, overlong: Overlong = "error"
) -> RenderedCorpus:
    """Token ids of both texts of each example, with the special tokens that the tokenizer puts around a text.

    Args:
        max_length: of the longer of the two.
        overlong: a row with a longer text is an error, is dropped, or is truncated: the end of the text is cut.

    Raises:
        DataError: rows that are too long, or nothing left. All of them at once.
    """
    sorting = _MatchSorting(tokenizer, (), max_length, overlong)
    for some in in_batches(examples):
        sides = [encoded(tokenizer, [replace(one, texts=(one.texts[side],)) for one in some]) for side in (0, 1)]
        sorting.add(some, [_both(*pair) for pair in zip(*sides, strict=True)])
    return sorting.finished()


def _both(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Of the two, `input_ids` has the longer one: by it the row fits or does not."""
    sides = first["input_ids"], second["input_ids"]
    return {"input_ids": max(sides, key=len), "sides": sides}


class _MatchSorting(Sorting):
    def row(self, example: Example, made: Mapping[str, Any]) -> Rendered:
        cut = len(made["input_ids"]) > self.max_length
        sides = made["sides"]
        if cut:
            options = {"truncation": True, "max_length": self.max_length}
            alone = [replace(example, texts=(text,)) for text in example.texts]
            sides = [one["input_ids"] for one in encoded(self.tokenizer, alone, **options)]
        first, second = map(tuple, sides)
        supervised = (False,) * len(first) + (True,) * len(second)
        size = sum(map(len, example.texts))
        return Matched(first + second, supervised, example.place, cut, size, len(first))


def stack_matched(rows: Sequence[Matched], *, pad_id: int, starts: Sequence[int], at_once: int = 0) -> MatchBatch:
    """Rows as one batch; `starts` as in `make_batch`."""
    firsts = [side(row, row.asked) for row in rows]
    seconds = [side(row, row.match) for row in rows]
    places = [*starts, *(start + row.border for start, row in zip(starts, rows, strict=True))]
    ids, positions, counters, mask = padded_tokens([*firsts, *seconds], pad_id, places)
    numbers: dict[tuple[int, ...], int] = {}
    texts = torch.tensor([numbers.setdefault(row.match, len(numbers)) for row in rows])
    return MatchBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=None,
        attention_mask=torch.from_numpy(mask),
        scored=torch.arange(len(rows)),
        targets=torch.arange(len(rows)),
        tokens=torch.from_numpy(counters),
        examples=len(rows),
        computed_tokens=int(mask.sum()),
        same=(texts[:, None] == texts).fill_diagonal_(False),
        at_once=at_once,
    )


def side(row: TwoTexts, ids: tuple[int, ...]) -> Labelled:
    """One of a row's texts as a row."""
    return Labelled(ids, (False,) * len(ids), row.place, row.truncated)
