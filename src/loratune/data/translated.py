"""Texts and what an encoder-decoder writes for them: from rows to token ids, and these to tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratune.data.batch import Batch, offsets, padded_tokens
from loratune.data.example import Example
from loratune.data.labelled import Sorting, in_batches
from loratune.data.matched import TwoTexts, side
from loratune.data.render import Overlong, Rendered, RenderedCorpus
from loratune.data.shapes import SHAPES
from loratune.data.tokens import Tokenizer
from loratune.errors import DataError

# What has a question and an answer that are texts, not messages.
TRANSLATED = tuple(shape for shape in SHAPES if shape.name in ("prompt/completion", "instruction/output"))
_IGNORED = -100  # what transformers takes for no target


@dataclass(frozen=True, slots=True)
class Translated(TwoTexts):
    """A text that is read, and after it, all of it supervised, the one that is written."""


@dataclass(frozen=True, slots=True)
class TranslatedBatch(Batch):
    """Padded texts that are read; `scored` counts the decoder's positions, flattened.

    Attributes:
        labels: int64 (B, U), what is written, -100 behind its end.
    """

    labels: Tensor | None = None


def render_translated(
    examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int, overlong: Overlong = "error"
) -> RenderedCorpus:
    """Token ids of both texts of each example, each with the special tokens that the tokenizer gives it.

    Args:
        max_length: of the longer of the two.
        overlong: a row with a longer text is an error, is dropped, or is truncated: the end of what is read is cut.

    Raises:
        DataError: messages, which need a chat template; rows that are too long, or nothing left. All of them at once.
    """
    rows = list(examples)
    chats = [f"{row.place}: messages, where a text and its answer are expected" for row in rows if row.kind != "pair"]
    if chats:
        raise DataError(chats, hint="give prompt and completion as strings")
    sorting = _Translating(tokenizer, (), max_length, overlong)
    for some in in_batches(rows):
        texts = [replace(one, texts=(one.prompt + one.separator, one.completion)) for one in some]
        sorting.add(texts, [_both(tokenizer, one) for one in texts])
    return sorting.finished()


def _both(tokenizer: Tokenizer, example: Example) -> dict[str, Any]:
    """Of the two, `input_ids` has the longer one: by it the row fits or does not."""
    read, written = example.texts
    sides = tokenizer(read, verbose=False)["input_ids"], tokenizer(text_target=written, verbose=False)["input_ids"]
    return {"input_ids": max(sides, key=len), "sides": sides}


class _Translating(Sorting):
    def row(self, example: Example, made: Mapping[str, Any]) -> Rendered | None:
        first, second = made["sides"]
        eos = self.encoder.eos
        if eos is not None and second[-1:] != [eos]:
            second = [*second, eos]
        cut = len(first) > self.max_length
        if cut:
            first = self.tokenizer(example.texts[0], truncation=True, max_length=self.max_length)["input_ids"]
        if len(second) > self.max_length:
            reason = f"answer cut off by truncation: it has {len(second)} tokens, more than {self.max_length}"
            self.problems.append((example.place, reason))
            self.hints["raise --max-length, or use --overlong drop"] = None
            return None
        ids, supervised = (*first, *second), (False,) * len(first) + (True,) * len(second)
        return Translated(ids, supervised, example.place, cut, sum(map(len, example.texts)), len(first))


def stack_translated(
    rows: Sequence[Translated], *, pad_id: int, starts: Sequence[int] | None = None
) -> TranslatedBatch:
    """Rows below each other; `starts` as in `make_batch`."""
    sides = [side(row, row.asked) for row in rows]
    ids, positions, counters, mask = padded_tokens(sides, pad_id, offsets(rows) if starts is None else starts)
    labels = np.full((len(rows), max(row.units for row in rows)), _IGNORED, np.int64)
    for number, row in enumerate(rows):
        labels[number, : row.units] = row.match
    scored = np.flatnonzero(labels != _IGNORED)
    return TranslatedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=None,
        attention_mask=torch.from_numpy(mask),
        scored=torch.from_numpy(scored),
        targets=torch.from_numpy(labels.reshape(-1)[scored]),
        tokens=torch.from_numpy(counters),
        examples=len(rows),
        computed_tokens=sum(len(row.ids) for row in rows),
        labels=torch.from_numpy(labels),
    )
