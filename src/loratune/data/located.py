"""Questions whose answers stand in a text: from rows to windows of token ids, and these to tensors.

The model reads a question and its context as its tokenizer dresses two texts, and a head gives each token two numbers:
of an answer that begins there, and of one that ends there (Devlin et al., "BERT", 2019, section 4.2). A context that is
too long for this is read in windows, which overlap so that a short answer is whole in one of them. A window that has
not the whole answer teaches the first token, and so does a question that the context does not answer (section 4.3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loratune.data.example import Example, Place
from loratune.data.labelled import LabelBatch, Labelled, Sorting, in_batches, stack_labelled
from loratune.data.messages import checked_text, kind, parsed
from loratune.data.render import Overlong, Rendered, RenderedCorpus
from loratune.data.shapes import Shape, text_of
from loratune.data.tokens import Tokenizer
from loratune.errors import DataError

# Tokens that two neighbouring windows both have, where they are long enough: what SQuAD is read with.
_OVERLAP = 128
_SHOWN = 40
_NUMBER = re.compile(r"-?[0-9]{1,18}")
# First and one past the last: of characters, or of tokens.
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Located(Labelled):
    """A question and one window of its context. `targets` are the answer's first and last token.

    Args:
        places: of each token, which characters of the context it stands for; None where it is not of the context.
        context: all of it. answers: each that is right, in the context's own words; none where it answers nothing.
        window: which one of its row, from 0. nowhere: the token that stands for no answer.
    """

    places: tuple[Span | None, ...] = ()
    context: str = ""
    answers: tuple[str, ...] = ()
    window: int = 0
    nowhere: int = 0

    def said(self, first: int, last: int) -> str:
        """What the context says from one token to another; nothing where they are not of it."""
        begin, end = self.places[first], self.places[last]
        return self.context[begin[0] : end[1]].strip() if begin and end else ""


@dataclass(frozen=True, slots=True)
class LocatedBatch(LabelBatch):
    """Padded windows. Each has two targets among its own tokens: where the answer begins, and where it ends."""


# -- rows ----------------------------------------------------------------------------------------------------------


def _squad(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    """Lists of texts and of their places, as the columns of SQuAD have them; empty ones where there is no answer."""
    value = parsed(row["answers"], "column 'answers'", problems)
    lists: list[Any] = [value.get(name) for name in ("text", "answer_start")] if isinstance(value, Mapping) else []
    if not lists or not all(isinstance(one, list | tuple) for one in lists):
        if value is not None or row["answers"] is None:
            problems.append(
                f"column 'answers' is {kind(value)}, expected an object of two lists, text and answer_start"
            )
        return _located(place, row, [], problems)
    texts, starts = lists
    if len(texts) != len(starts):
        problems.append(f"{len(texts)} texts and {len(starts)} starts in 'answers': each answer needs one")
    return _located(place, row, list(zip(texts, starts, strict=False)), problems)


def _flat(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    """One answer and its place; null or blank where there is none."""
    answer = row["answer"]
    absent = answer is None or (isinstance(answer, str) and not answer.strip())
    return _located(place, row, [] if absent else [(answer, row["answer_start"])], problems)


def _located(
    place: Place, row: Mapping[str, Any], answers: Sequence[tuple[object, object]], problems: list[str]
) -> Example:
    texts = tuple(text_of(row, name, problems) for name in ("question", "context"))
    if not problems:
        empty = [name for name, text in zip(("question", "context"), texts, strict=True) if not text.strip()]
        problems += [f"row without a {name}: it is empty" for name in empty]
    several = len(answers) > 1
    named = [(f"answer {number}" if several else "the answer", *one) for number, one in enumerate(answers, 1)]
    spans = [_span(texts[1], text, start, name, problems) for name, text, start in ([] if problems else named)]
    return Example(place, "located", texts=texts, spans=tuple(span for span in spans if span is not None))


def _span(context: str, text: object, start: object, what: str, problems: list[str]) -> Span | None:
    """Where the answer stands, by its first character; None after saying what is wrong with it."""
    if not isinstance(text, str) or not text.strip():
        problems.append(f"{what} is {'empty' if isinstance(text, str) else kind(text)}, expected a part of the context")
        return None
    begin = _whole(start)
    if begin is None:
        problems.append(f"answer_start of {what} is {kind(start)}, expected the number of a character")
        return None
    text = checked_text(text, what, problems)
    if begin >= 0 and context[begin : begin + len(text)] == text:
        return begin, begin + len(text)
    shown, there = _short(text), _nearest(context, text, begin)
    if 0 <= begin < len(context):
        where = f"is not at character {begin} of the context, which says {_short(context[begin : begin + len(text)])}"
    else:
        where = f"is said to be at character {begin}, and the context has {len(context)}"
    problems.append(f"{what}, {shown}, {where}: it is {'nowhere in it' if there is None else f'at {there}'}")
    return None


def _whole(value: object) -> int | None:
    """A whole number, also where a column with nulls in it became one of floats, or a table one of texts."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def _nearest(context: str, text: str, wanted: int) -> int | None:
    """Where the text stands nearest to `wanted`."""
    after, before = context.find(text, max(0, wanted)), context.rfind(text, 0, max(0, wanted) + len(text))
    found = [at for at in (after, before) if at >= 0]
    return min(found, key=lambda at: abs(at - wanted), default=None)


LOCATED = (
    Shape("question/context/answers", ("question", "context", "answers"), (), _squad),
    Shape("question/context/answer", ("question", "context", "answer", "answer_start"), (), _flat),
)


# -- token ids -----------------------------------------------------------------------------------------------------


def render_located(
    examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int, overlong: Overlong = "error"
) -> RenderedCorpus:
    """Windows of all examples, each with the first and last token of the first answer.

    A long context is no fault: only a question that leaves its windows less than half of `max_length` is, and an answer
    that is in none of them whole.

    Args:
        max_length: of a window, with its question.
        overlong: such rows are an error, or are dropped; there is nothing to truncate.

    Raises:
        DataError: a tokenizer that does not say which characters a token is of; contexts or answers of which no token
            is left, rows as above, or nothing left. All of them at once.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the tokenizer does not say which characters a token is of", hint="use a model with a fast tokenizer"
        )
    sorting = _Locating(tokenizer, (), max_length, overlong)
    for some in in_batches(examples):
        sorting.add(some, _encoded(tokenizer, some))
    return sorting.finished()


def _encoded(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[dict[str, Any]]:
    texts = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
    made = tokenizer(*texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    rows = [{name: values[i] for name, values in made.items()} for i in range(len(examples))]
    return [{**row, "sides": made.sequence_ids(i)} for i, row in enumerate(rows)]


def windows(length: int, room: int) -> list[Span]:
    """The windows of a context of `length` tokens, `room` of which go through the model at once."""
    overlap = min(_OVERLAP, room // 2)
    return [(at, min(at + room, length)) for at in range(0, max(1, length - overlap), room - overlap)]


class _Locating(Sorting):
    def add(self, examples: Sequence[Example], encoded: Iterable[Mapping[str, Any]]) -> None:
        for example, made in zip(examples, encoded, strict=True):
            if any(self.encoder.spelled.search(text) for text in example.texts):
                self.special.append(example.place)
            self.rows += self._windows(example, made)

    def _windows(self, example: Example, made: Mapping[str, Any]) -> list[Rendered]:
        """The row's windows; none after noting what is wrong with it."""
        context = [at for at, side in enumerate(made["sides"]) if side == 1]
        if not context:
            return self._lost(example, "its context")
        begin, stop = context[0], context[-1] + 1
        around = len(made["sides"]) - (stop - begin)
        room = self.max_length - around
        if len(made["sides"]) > self.max_length and room < around:
            return self._left_out(example, f"its question takes {around} of {self.max_length} tokens")
        places = [(int(first), int(last)) for first, last in made["offset_mapping"][begin:stop]]
        answer = _tokens_of(example.spans[0], places) if example.spans else None
        if example.spans and answer is None:
            return self._lost(example, "its answer")
        found = windows(stop - begin, room)
        if answer is not None and not any(_has(window, answer) for window in found):
            return self._left_out(example, f"its answer of {answer[1] - answer[0]} tokens is in no window of {room}")
        return [self._window(example, made, number, window, answer, begin, stop) for number, window in enumerate(found)]

    def _window(
        self,
        example: Example,
        made: Mapping[str, Any],
        number: int,
        window: Span,
        answer: Span | None,
        begin: int,
        stop: int,
    ) -> Rendered:
        """One window; the context's tokens are those from `begin` to `stop`."""

        def cut(values: Sequence[Any]) -> tuple[Any, ...]:
            return (*values[:begin], *values[begin + window[0] : begin + window[1]], *values[stop:])

        ids, offsets = cut(made["input_ids"]), made["offset_mapping"]
        classifier = getattr(self.tokenizer, "cls_token_id", None)
        nowhere = ids.index(classifier) if classifier in ids else 0
        moved = begin - window[0]
        targets = (nowhere, nowhere)
        if answer is not None and _has(window, answer):
            targets = (answer[0] + moved, answer[1] - 1 + moved)
        question, context = example.texts
        return Located(
            ids,
            tuple(targets[0] <= at <= targets[1] for at in range(len(ids))),
            example.place,
            truncated=False,
            characters=len(question) + offsets[begin + window[1] - 1][1] - offsets[begin + window[0]][0],
            targets=targets,
            types=cut(made["token_type_ids"]) if "token_type_ids" in made else (),
            places=cut([pair if side == 1 else None for pair, side in zip(offsets, made["sides"], strict=True)]),
            context=context,
            answers=tuple(context[first:last] for first, last in example.spans),
            window=number,
            nowhere=nowhere,
        )

    def _lost(self, example: Example, what: str) -> list[Rendered]:
        self.problems.append((example.place, f"{what} has no token"))
        self.hints["remove rows that the tokenizer leaves nothing of"] = None
        return []

    def _left_out(self, example: Example, reason: str) -> list[Rendered]:
        if self.overlong == "drop":
            self.dropped.append(example.place)
        else:
            self.problems.append((example.place, reason))
            self.hints["raise --max-length where the model's context has room, or use --overlong drop"] = None
        return []


def _has(window: Span, answer: Span) -> bool:
    return window[0] <= answer[0] and answer[1] <= window[1]


def _tokens_of(characters: Span, places: Sequence[Span]) -> Span | None:
    """The fewest tokens that have all of these characters; None where no token has any."""
    inside = [at for at, (first, last) in enumerate(places) if first < characters[1] and last > characters[0]]
    return (inside[0], inside[-1] + 1) if inside else None


# -- tensors -------------------------------------------------------------------------------------------------------


def stack_located(rows: Sequence[Located], *, pad_id: int, starts: Sequence[int]) -> LocatedBatch:
    """Windows below each other; `starts` as in `make_batch`."""
    made = stack_labelled(rows, pad_id=pad_id, starts=starts)
    return LocatedBatch(
        input_ids=made.input_ids,
        position_ids=made.position_ids,
        segments=None,
        attention_mask=made.attention_mask,
        scored=torch.arange(made.targets.numel()),
        targets=made.targets,
        tokens=made.tokens,
        examples=made.examples,
        computed_tokens=made.computed_tokens,
        types=made.types,
    )
