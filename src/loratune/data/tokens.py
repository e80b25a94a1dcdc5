"""Text with character spans to token ids with a loss mask, the way inference will see it.

Training reads a row whole; inference tokenises the prompt alone and continues with the model's own tokens. Both see
the same ids unless the tokenizer joins characters across the border between prompt and answer. So every border is
checked against the prompt tokenised alone, and a row that differs is tokenised in segments instead.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loratune.errors import DataError

Ids = list[int]
Offsets = list[tuple[int, int]]


class Tokenizer(Protocol):
    """What this room uses of a `transformers` tokenizer."""

    chat_template: Any
    eos_token_id: Any
    all_special_ids: Any
    added_tokens_decoder: Any
    special_tokens_map: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __len__(self) -> int: ...
    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_chat_template(self, *args: Any, **kwargs: Any) -> Any: ...
    def decode(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Spanned:
    """One row as text.

    Args:
        answers: character ranges [start, end) of the supervised answers, ascending. In a chat each ends right after
            its end-of-turn token.
        chat: a chat template wrote the text, so it has its own special tokens; otherwise the tokenizer's are added.
        everything: all tokens are supervised, `answers` only say where turns end.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    chat: bool
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids and mask of one row, and the ids that end its answers.

    `unended` is the text that stands where an end-of-turn token should, if one is missing; then there are no ids.
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    ends: tuple[int, ...] = ()
    unended: str | None = None


class Encoder:
    """A tokenizer with what has to be known about it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder
        self.special: dict[int, str] = {number: str(token) for number, token in added.items() if token.special}
        missing = [number for number in tokenizer.all_special_ids if number not in self.special]
        self.special |= {number: tokenizer.decode([number]) for number in missing}
        spelled = sorted((token for token in self.special.values() if token), key=len, reverse=True)
        self.spelled = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self.has_offsets = bool(getattr(tokenizer, "is_fast", False))
        self.leading, self.trailing = self._added_around()
        self._newline = self.encode_all(["\n"])[0]
        after_newline = self.encode_all(["\nx"])[0][len(self._newline) :]
        self._puts_space_first = after_newline != self.encode_all(["x"])[0]
        self._alone: dict[str, Ids] = {}
        # One object for each id: a token then costs a row 8 bytes rather than 36.
        self._objects: dict[int, int] = {}

    def encode_all(self, texts: Sequence[str], *, special: bool = False) -> list[Ids]:
        if not texts:
            return []
        made = self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in made["input_ids"]]

    def prompt(self, text: str, *, chat: bool) -> Ids:
        """Ids of a text that inference starts from."""
        ids = self.encode_all([text])[0]
        return ids if chat else self.leading + ids

    def encode(self, rows: Sequence[Spanned]) -> list[Encoded]:
        """Ids and masks of a batch of rows.

        Raises:
            DataError: a row needs an end-of-sequence token, and the tokenizer has none.
        """
        if self.eos is None and not all(row.chat for row in rows):
            raise DataError(
                "the tokenizer has no end-of-sequence token, so nothing would tell the model to stop",
                hint="set tokenizer.eos_token, or use a model with a chat template",
            )
        if not rows:
            return []
        if not self.has_offsets:
            return self._in_segments(rows)
        made = self.tokenizer(
            [row.text for row in rows],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        whole = list(zip(made["input_ids"], made["offset_mapping"], strict=True))
        crossed = self._crossed(rows, whole)
        segmented = dict(zip(crossed, self._in_segments([rows[index] for index in crossed]), strict=True))
        return [
            segmented[index] if index in segmented else self._finish(row, ids, _marked(row, offsets))
            for index, (row, (ids, offsets)) in enumerate(zip(rows, whole, strict=True))
        ]

    def _crossed(self, rows: Sequence[Spanned], whole: Sequence[tuple[Ids, Offsets]]) -> list[int]:
        """Rows in which some token is not the one that the prompt alone would give.

        Only the prompt's tail from its last special token on is compared: no tokenizer joins across one.
        """
        borders: list[tuple[int, str, Ids]] = []
        for index, (row, (ids, offsets)) in enumerate(zip(rows, whole, strict=True)):
            ends = [end for _, end in offsets]
            for start, _ in row.answers:
                first = bisect_right(ends, start)
                anchor = next((at for at in range(first - 1, 0, -1) if ids[at] in self.special), 0)
                tail = row.text[offsets[anchor][0] if anchor else 0 : start]
                borders.append((index, tail, ids[anchor:first]))
        new = list(dict.fromkeys(tail for _, tail, _ in borders if tail not in self._alone))
        alone = self._alone | dict(zip(new, self.encode_all(new), strict=True))
        # Chat headers repeat in every row, raw prompts in none.
        self._alone |= {tail: alone[tail] for tail in new if len(tail) < 100 and len(self._alone) < 10_000}
        return list(dict.fromkeys(index for index, tail, ids in borders if alone[tail] != ids))

    def _in_segments(self, rows: Sequence[Spanned]) -> list[Encoded]:
        """Prompt, answer, prompt, answer …, each tokenised by itself as inference does."""
        cut = [_pieces(row) for row in rows]
        openings = self.encode_all([pieces[0][0] for pieces in cut])
        rest = iter(self._continuations([text for pieces in cut for text, _ in pieces[1:]]))
        result = []
        for row, pieces, opening in zip(rows, cut, openings, strict=True):
            ids: Ids = []
            marked: list[tuple[int, int]] = []
            for number, (_, is_answer) in enumerate(pieces):
                piece = next(rest) if number else opening
                if is_answer:
                    marked.append((len(ids), len(ids) + self._without_tail(piece, chat=row.chat)))
                ids = ids + piece
            result.append(self._finish(row, ids, marked))
        return result

    def _without_tail(self, ids: Ids, *, chat: bool) -> int:
        """How many ids of an answer count: in a chat, those up to its end-of-turn token."""
        if not chat:
            return len(ids)
        last = max((at for at, number in enumerate(ids) if number in self.special), default=len(ids) - 1)
        return len(ids) if self.tokenizer.decode(ids[last + 1 :]).strip() else last + 1

    def _continuations(self, pieces: Sequence[str]) -> list[Ids]:
        """Ids of texts that follow other text: without the space that SentencePiece puts before a beginning."""
        if not self._puts_space_first:
            return self.encode_all(pieces)
        length = len(self._newline)
        return [
            joined[length:] if joined[:length] == self._newline else alone
            for joined, alone in zip(
                self.encode_all(["\n" + piece for piece in pieces]), self.encode_all(pieces), strict=True
            )
        ]

    def _finish(self, row: Spanned, ids: Ids, marked: Iterable[tuple[int, int]]) -> Encoded:
        """Adds the special tokens of a raw row, lays the mask, and looks for the end of each turn."""
        ranges = list(marked)
        ends: list[int] = []
        if row.chat:
            for start, stop in ranges:
                if stop <= start or ids[stop - 1] not in self.special:
                    return Encoded((), (), unended=self.tokenizer.decode(ids[start:stop][-6:]))
                ends.append(ids[stop - 1])
        elif self.eos is not None:
            after = self.trailing if self.trailing[-1:] == [self.eos] else [*self.trailing, self.eos]
            ends.append(self.eos)
            shift = len(self.leading)
            ranges = [(start + shift, stop + shift + len(after)) for start, stop in ranges]
            ids = self.leading + ids + after
        if row.everything:
            ranges = [(0, len(ids))]
        mask = [False] * len(ids)
        for start, stop in ranges:
            mask[start:stop] = [True] * (stop - start)
        mask[:1] = [False] * len(ids[:1])
        return Encoded(tuple(map(self._objects.setdefault, ids, ids)), tuple(mask), tuple(ends))

    def _added_around(self) -> tuple[Ids, Ids]:
        """The special tokens that the tokenizer itself puts before and after a text."""
        bare, dressed = self.encode_all(["a"])[0], self.encode_all(["a"], special=True)[0]
        for at in range(len(dressed) - len(bare) + 1):
            if dressed[at : at + len(bare)] == bare:
                return dressed[:at], dressed[at + len(bare) :]
        return [], []


def _marked(row: Spanned, offsets: Offsets) -> list[tuple[int, int]]:
    ends = [end for _, end in offsets]
    if not row.chat:
        # Its one answer reaches to the end, whose last character may be several tokens (bytes).
        return [(bisect_right(ends, start), len(ends)) for start, _ in row.answers]
    return [(bisect_right(ends, start), min(bisect_left(ends, stop) + 1, len(ends))) for start, stop in row.answers]


def _pieces(row: Spanned) -> list[tuple[str, bool]]:
    """The text cut before and after every answer, at least one piece, each with whether it is an answer.

    White space after an answer stays with it: some end-of-turn tokens swallow it.
    """
    pieces: list[tuple[str, bool]] = []
    at = 0
    for start, stop in row.answers:
        after = len(row.text) - len(row.text[stop:].lstrip())
        pieces += [(row.text[at:start], False), (row.text[start:after], True)]
        at = after
    pieces.append((row.text[at:], False))
    return [piece for piece in pieces if piece[0]] or [("", False)]
