"""Examples to token ids and loss masks.

render(examples, tokenizer, max_length=2048) → RenderedCorpus       everything training needs
render_prompt(example, tokenizer)            → ids, answer          what sampling and scoring need
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from loratune.data.example import Example, Place
from loratune.data.messages import answers
from loratune.data.template import ChatTemplate, Loss, Messages, TemplateFault
from loratune.data.tokens import Encoded, Encoder, Spanned, Tokenizer
from loratune.errors import ConfigError, DataError

Overlong = Literal["error", "drop", "truncate"]
_BATCH = 512
_TEXT_PROMPT = 32


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row.

    Args:
        ids: token ids, no padding.
        supervised: `supervised[i]`: `ids[i]` is a target, predicted from `ids[:i]`; index 0 never is.
        truncated: less than the example says.
        characters: length of the text that the ids stand for.
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    place: Place
    truncated: bool
    characters: int = 0

    @property
    def units(self) -> int:
        """How many things the row teaches: a step's loss is the mean over them."""
        return sum(self.supervised)

    @property
    def asked(self) -> tuple[int, ...]:
        """The tokens that a model which does not write is asked about."""
        return self.ids

    @property
    def needed(self) -> int:
        """How many tokens must go through the model: what follows the last scored position predicts nothing."""
        return len(self.supervised) - 1 - self.supervised[::-1].index(True)


@dataclass(frozen=True, slots=True)
class RenderedCorpus:
    """All rows in order, and what happened to them.

    Args:
        dropped: rows left out because they were too long.
        truncated: rows cut because they were too long.
        special_tokens_in_text: rows whose own text spells a special token of the tokenizer. It reads as that token:
            normal between documents of plain text, an injected turn anywhere else.
        end_of_turn: ids that end the supervised answers, ascending: what generation must stop at.
    """

    rows: tuple[Rendered, ...]
    dropped: tuple[Place, ...]
    truncated: tuple[Place, ...]
    special_tokens_in_text: tuple[Place, ...] = ()
    end_of_turn: tuple[int, ...] = ()

    @property
    def examples(self) -> int:
        """How many rows of the data are left: a long one may have become several."""
        return len({row.place for row in self.rows})


def render(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    loss: Loss = "assistant",
    max_length: int,
    overlong: Overlong = "error",
) -> RenderedCorpus:
    """Token ids and loss masks of all examples.

    Chats, and pairs where the tokenizer has a chat template, are written by it; answers and their end-of-turn tokens
    are supervised. A pair without a template is prompt, completion and end-of-sequence token; a text is text and
    end-of-sequence token, all supervised.

    Args:
        loss: `assistant` supervises every answer, `completion` the last, `all` every token but the first.
        max_length: longest row in tokens, at least 2.
        overlong: a longer row is an error, is dropped, or is truncated: a text at its end, a chat by whole trailing
            turns so that it still ends with a complete answer.

    Raises:
        ConfigError: a setting is not one of these.
        DataError: a template that cannot be masked; rows that cannot be rendered, teach nothing, are too long or
            whose only answer would be cut off; or nothing left. All of them at once.
    """
    _check_settings(loss, max_length, overlong)
    work = _Rendering(tokenizer, loss, max_length, overlong)
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == _BATCH:
            work.add(batch)
            batch = []
    work.add(batch)
    return work.finished()


def render_prompt(example: Example, tokenizer: Tokenizer) -> tuple[tuple[int, ...], str]:
    """What to generate from, and what the row answers.

    Returns:
        The ids of everything before the last answer, with the header that asks for it, and that answer's text. A row
        read as a prompt that has no answer is sent whole, and the answer is empty. A text that is trained on has no
        answer either: it is cut after its first half, at most 32 tokens, and the answer is how it goes on.

    Raises:
        DataError: the row has no such form for this tokenizer.
    """
    encoder = Encoder(tokenizer)
    template = ChatTemplate(encoder, _generation_marks)
    if example.kind == "text":
        ids = encoder.encode_all([example.text])[0]
        cut = max(1, min(_TEXT_PROMPT, len(ids) // 2))
        return tuple(encoder.leading + ids[:cut]), str(tokenizer.decode(ids[cut:]))
    if example.kind == "pair" and not template.exists:
        return tuple(encoder.prompt(example.prompt + example.separator, chat=False)), example.completion
    try:
        before, answer = template.prompt(example)
    except TemplateFault as fault:
        raise DataError(f"{example.place}: {fault.reason}", hint=fault.hint) from None
    return tuple(encoder.prompt(before, chat=True)), answer


def _generation_marks(
    tokenizer: Tokenizer, messages: Messages, tools: list[dict[str, Any]] | None
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the character ranges that the template itself marks as the model's.

    `apply_chat_template` only gives marked tokens, and a token that begins before its mark hides where the mark is.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    written: Any = render_jinja_template  # its annotation says one string
    texts, marks = written(
        conversations=[messages],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        **tokenizer.special_tokens_map,
    )
    return texts[0], marks[0]


def _check_settings(loss: str, max_length: int, overlong: str) -> None:
    problems = []
    if loss not in get_args(Loss):
        problems.append(f"loss={loss!r}: not one of {', '.join(get_args(Loss))}")
    if overlong not in get_args(Overlong):
        problems.append(f"overlong={overlong!r}: not one of {', '.join(get_args(Overlong))}")
    if max_length < 2:
        problems.append(f"max_length={max_length!r}: a row needs a token to predict another from")
    if problems:
        raise ConfigError(problems)


@dataclass
class _Faults:
    """Problems of rows, and of the template: those are told once, not for every row."""

    rows: list[str] = field(default_factory=list)
    hints: dict[str, None] = field(default_factory=dict)
    _everywhere: Counter[str] = field(default_factory=Counter)
    _first: dict[str, Place] = field(default_factory=dict)

    def row(self, place: Place, reason: str, hint: str) -> None:
        self.rows.append(f"{place}: {reason}")
        self.hints[hint] = None

    def template(self, place: Place, fault: TemplateFault) -> None:
        if not fault.everywhere:
            self.row(place, fault.reason, fault.hint)
            return
        self._everywhere[fault.reason] += 1
        self._first.setdefault(fault.reason, place)
        self.hints[fault.hint] = None

    def refuse(self) -> None:
        everywhere = [
            f"{reason} ({count} rows, the first is {self._first[reason]})" for reason, count in self._everywhere.items()
        ]
        if everywhere or self.rows:
            raise DataError(everywhere + self.rows, hint="; ".join(self.hints))


class _Rendering:
    """One pass over a corpus."""

    def __init__(self, tokenizer: Tokenizer, loss: Loss, max_length: int, overlong: Overlong) -> None:
        self.encoder = Encoder(tokenizer)
        self.template = ChatTemplate(self.encoder, _generation_marks)
        self.loss, self.max_length, self.overlong = loss, max_length, overlong
        self.faults = _Faults()
        self.rows: list[Rendered] = []
        self.dropped: list[Place] = []
        self.special: list[Place] = []
        self.too_long: list[tuple[Place, int]] = []
        self.ends: set[int] = set()

    def add(self, batch: Sequence[Example]) -> None:
        written: list[tuple[Example, Spanned]] = []
        for example in batch:
            try:
                written.append((example, self.template.spanned(example, self.loss)))
            except TemplateFault as fault:
                self.faults.template(example.place, fault)
        made = self.encoder.encode([spanned for _, spanned in written])
        for (example, spanned), encoded in zip(written, made, strict=True):
            self._add(example, spanned, encoded)

    def finished(self) -> RenderedCorpus:
        if self.too_long:
            longest = max(length for _, length in self.too_long)
            hint = f"--overlong truncate or drop, or --max-length {longest}"
            for place, length in self.too_long:
                self.faults.row(place, f"{length} tokens, longer than {self.max_length}", hint)
        self.faults.refuse()
        if not self.rows:
            if self.dropped:
                raise DataError(
                    f"all {len(self.dropped)} rows are longer than {self.max_length} tokens and were dropped",
                    hint="raise --max-length",
                )
            raise DataError("no rows to render", hint="give at least one row")
        truncated = tuple(row.place for row in self.rows if row.truncated)
        return RenderedCorpus(
            tuple(self.rows), tuple(self.dropped), truncated, tuple(self.special), tuple(sorted(self.ends))
        )

    def _add(self, example: Example, spanned: Spanned, encoded: Encoded) -> None:
        if not self._is_sound(example, encoded):
            return
        row = Rendered(encoded.ids, encoded.supervised, example.place, truncated=False, characters=len(spanned.text))
        if len(row.ids) > self.max_length:
            if self.overlong == "error":
                self.too_long.append((example.place, len(row.ids)))
                return
            if self.overlong == "drop":
                self.dropped.append(example.place)
                return
            shorter = self._truncated(example, spanned, row)
            if shorter is None:
                return
            row = shorter
        self.ends.update(encoded.ends)
        self.rows.append(row)

    def _is_sound(self, example: Example, encoded: Encoded) -> bool:
        if encoded.unended is not None:
            self.faults.template(
                example.place,
                TemplateFault(
                    f"the chat template ends an answer with {encoded.unended!r}, which is no special token: "
                    "the model would never learn to stop",
                    "add the template's end-of-turn token to the tokenizer, or use the model's own template",
                    everywhere=True,
                ),
            )
            return False
        if not any(encoded.supervised):
            self.faults.row(example.place, "no supervised token", "remove the row: it teaches nothing")
            return False
        spelled = {token for text in _texts(example) for token in self.encoder.spelled.findall(text)}
        if not spelled:
            return True
        self.special.append(example.place)
        stops = {self.encoder.special.get(number) for number in (*encoded.ends, self.encoder.eos) if number is not None}
        inside = sorted(
            {token for text in _answer_texts(example) for token in self.encoder.spelled.findall(text)} & stops
        )
        for token in inside:
            self.faults.row(
                example.place,
                f"the answer contains {token!r}, which ends it in the middle",
                "remove the token from the data: it is added after each answer",
            )
        return not inside

    def _truncated(self, example: Example, spanned: Spanned, row: Rendered) -> Rendered | None:
        if example.kind == "text":
            share = self.max_length / len(row.ids)
            return replace(
                row,
                ids=row.ids[: self.max_length],
                supervised=row.supervised[: self.max_length],
                truncated=True,
                characters=round(len(spanned.text) * share),
            )
        shortest = len(row.ids)
        for last in reversed(answers(example.messages[:-1])):
            shorter = replace(example, messages=example.messages[: last + 1])
            try:
                spanned = self.template.spanned(shorter, self.loss)
            except TemplateFault as fault:
                self.faults.template(example.place, fault)
                return None
            encoded = self.encoder.encode([spanned])[0]
            if len(encoded.ids) <= self.max_length:
                return Rendered(encoded.ids, encoded.supervised, example.place, True, len(spanned.text))
            shortest = len(encoded.ids)
        self.faults.row(
            example.place,
            f"answer cut off by truncation: up to its first answer the row has {shortest} tokens, longer than "
            f"{self.max_length}",
            "raise --max-length, or use --overlong drop",
        )
        return None


def _texts(example: Example) -> list[str]:
    return [example.text, example.prompt, example.completion, *(message["content"] for message in example.messages)]


def _answer_texts(example: Example) -> list[str]:
    return [example.completion, *(example.messages[index]["content"] for index in answers(example.messages))]
