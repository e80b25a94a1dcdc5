"""The figures printed before training, and the mask as people see it."""

from __future__ import annotations

import pytest

from loratune.data.fit import fit, show_mask
from loratune.data.read import read
from loratune.data.render import Rendered, render
from tests.tiny import tiny_tokenizer

RAW = tiny_tokenizer(None, eos="<|endoftext|>", pad=None)


def test_counts() -> None:
    texts = ["Hello there!", "The capital of France is Paris.", "a", "word " * 40, "<|im_end|>"]
    corpus = render(read([{"text": text} for text in texts]).examples, RAW, max_length=30, overlong="truncate")
    found = fit(corpus, RAW)
    lengths = [min(30, len(RAW(text)["input_ids"]) + 1) for text in texts]
    assert (found.rows, found.tokens, found.longest) == (5, sum(lengths), 30)
    assert found.median == sorted(lengths)[2]
    assert found.mean == pytest.approx(sum(lengths) / 5)
    assert found.supervised_tokens == sum(lengths) - 5
    assert found.supervised_share == pytest.approx(1 - 5 / sum(lengths))
    assert (found.truncated, found.dropped, found.special_tokens_in_text) == (1, 0, 1)
    assert fit(corpus.rows, RAW).tokens == found.tokens
    cut = corpus.rows[3].characters
    assert found.characters_per_token == pytest.approx((sum(map(len, texts)) - 200 + cut) / sum(lengths))


def test_dropped_rows_are_counted() -> None:
    corpus = render(read([{"text": "a"}, {"text": "word " * 40}]).examples, RAW, max_length=30, overlong="drop")
    assert fit(corpus, RAW).dropped == 1


def test_unknown_tokens() -> None:
    row = Rendered((0, 2, 5, 2), (False, True, True, True), read([{"text": "a"}]).examples[0].place, False, 4)
    own = tiny_tokenizer(None, eos="<|im_end|>", pad=None, unk="<|endoftext|>")
    assert own.unk_token_id == 2
    assert fit([row], own).unknown_tokens == 2
    gpt2 = tiny_tokenizer(None, eos="<|endoftext|>", pad=None, unk="<|endoftext|>")
    assert fit([row], gpt2).unknown_tokens == 0
    assert fit([row], RAW).unknown_tokens == 0


def test_a_strange_script_shows_in_characters_per_token() -> None:
    def measure(text: str) -> float:
        return fit(render(read([{"text": text}]).examples, RAW, max_length=999), RAW).characters_per_token

    assert measure("ქართული ენა") < 0.6
    assert measure("The capital of France is Paris. " * 3) > 1.5


def test_pieces_are_the_row() -> None:
    pair = read([{"prompt": "The capital: ", "completion": "北京 🙂"}]).examples
    (row,) = render(pair, RAW, max_length=99).rows
    assert show_mask(row, RAW) == [("The capital: ", False), ("北京 🙂<|endoftext|>", True)]
    assert show_mask(Rendered((), (), row.place, False), RAW) == []
