"""What an encoder-decoder reads and writes: the loss of rows alone, and what is wrong with rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from loratune.data.pack import Layout, batches
from loratune.data.read import read
from loratune.data.translated import TRANSLATED, render_translated
from loratune.errors import DataError
from loratune.loss import summed_loss
from tests.models import EOS, saved_t5
from tests.tiny import tiny_tokenizer

ROWS = [
    {"prompt": "fine thank you", "completion": "Hello there"},
    {"prompt": "lazy dog and then some more words", "completion": "stop"},
    {"prompt": "Paris", "completion": "The capital of France"},
]


def rendered(rows: list[Any] = ROWS, **settings: Any) -> Any:
    examples = read(rows, shapes=TRANSLATED).examples
    return render_translated(examples, tiny_tokenizer(None), **{"max_length": 64, **settings})


@pytest.mark.parametrize("limit", [15, 10_000])
def test_loss_is_that_of_rows_alone(limit: int, tmp_path: Path) -> None:
    """Against the loss that transformers itself computes of one row, times its tokens."""
    model = T5ForConditionalGeneration.from_pretrained(saved_t5(tmp_path)).eval()
    rows = rendered().rows
    made = batches(rows, Layout.PADDED, limit=limit, pad_id=2)
    assert (len(made) > 1) == (limit == 15)
    expected = 0.0
    for row in rows:
        labels = torch.tensor([row.match])
        expected += float(model(input_ids=torch.tensor([row.asked]), labels=labels).loss) * len(row.match)
    assert sum(float(summed_loss(model, batch)) for batch in made) == pytest.approx(expected, rel=1e-4)
    assert sum(batch.supervised for batch in made) == sum(row.units for row in rows) == sum(len(r.match) for r in rows)


def test_every_answer_ends() -> None:
    assert all(row.match[-1] == EOS for row in rendered().rows)


def test_what_is_read_is_cut_but_no_answer() -> None:
    long = [{"prompt": "Hello " * 40, "completion": "stop"}]
    (row,) = rendered(long, max_length=8, overlong="truncate").rows
    assert (len(row.asked), row.truncated) == (8, True)
    with pytest.raises(DataError, match="answer cut off by truncation"):
        rendered([{"prompt": "a", "completion": "Hello " * 40}], max_length=8, overlong="truncate")
    with pytest.raises(DataError, match="longer than 8"):
        rendered(long, max_length=8)


def test_messages_are_refused() -> None:
    chat = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="rows:1: messages, where a text and its answer are expected"):
        rendered([chat, chat])
