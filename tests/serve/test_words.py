"""Tokens one at a time, as probabilities name them: together they are the text, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.serve.words import Words
from tests.serve.conftest import Shelf, asked_here, service, spelled
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LONG = {"model": "a", "prompt": "Name three rivers", "max_tokens": 60, "temperature": 1.6, "seed": 3}


@settings(derandomize=True, max_examples=100, deadline=None)
@given(content=st.text(max_size=30))
def test_the_bytes_of_tokens_are_those_of_the_text(content: str) -> None:
    words = Words(TOKENIZER)
    ids = TOKENIZER(content, add_special_tokens=False)["input_ids"]
    assert b"".join(words.bytes_of(token) for token in ids) == content.encode()


def test_special_tokens_are_what_they_are_called() -> None:
    assert Words(TOKENIZER).word(1) == "<|im_end|>"
    assert Words(TOKENIZER).bytes_of(99_999) == b""


def test_sentencepiece_keeps_spaces_and_bytes() -> None:
    words = Words(spelled({"\u2581the": 0, "<0xE4>": 1, "<0xBD>": 2, "<0xA0>": 3, "re": 4}, sentencepiece=True))
    assert [words.word(token) for token in (0, 4)] == [" the", "re"]
    assert b"".join(words.bytes_of(token) for token in (1, 2, 3)).decode() == "你"


@pytest.fixture(scope="module")
def client(shelf: Shelf) -> Iterator[httpx.Client]:
    with asked_here(service(shelf, "a")) as found:
        yield found


def chunks(answer: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


@pytest.mark.parametrize("seed", range(4))
def test_where_the_text_of_each_token_begins(client: httpx.Client, seed: int) -> None:
    body = {**LONG, "logprobs": 0, "seed": seed}
    (whole,) = client.post("/v1/completions", json=body).json()["choices"]
    probabilities = whole["logprobs"]
    offsets, words = probabilities["text_offset"], probabilities["tokens"]
    assert len(words) == len(offsets) == len(probabilities["token_logprobs"]) > 10
    for offset, word in zip(offsets, words, strict=True):
        if "\ufffd" not in word and not word.startswith("<|"):
            assert whole["text"][offset : offset + len(word)] == word
    parts = chunks(client.post("/v1/completions", json={**body, "stream": True}))
    for name in ("text_offset", "tokens", "token_logprobs", "top_logprobs"):
        streamed = [one for part in parts for one in part["logprobs"][name]]
        assert streamed == probabilities[name] or name == "token_logprobs"


def test_the_bytes_of_a_chat_are_its_text(client: httpx.Client) -> None:
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "temperature": 1.6}
    body |= {"seed": 5, "logprobs": True, "top_logprobs": 2, "logit_bias": {}}
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    content = choice["logprobs"]["content"]
    special = {token.content for token in TOKENIZER.added_tokens_decoder.values()}
    told = b"".join(bytes(one["bytes"]) for one in content if one["token"] not in special)
    assert told.decode(errors="replace") == choice["message"]["content"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)


def test_a_stop_token_is_not_told(client: httpx.Client, shelf: Shelf) -> None:
    """It is counted, and no part of the answer."""
    found = service(shelf, "a")
    found.stop_ids = frozenset(range(len(TOKENIZER)))
    with asked_here(found) as one:
        answer = one.post("/v1/completions", json={**LONG, "logprobs": 2}).json()
        (chunk,) = chunks(one.post("/v1/completions", json={**LONG, "logprobs": 2, "stream": True}))
    assert answer["usage"]["completion_tokens"] == 1
    for choice in (*answer["choices"], chunk):
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["tokens"] == []
        assert choice["logprobs"]["text_offset"] == []
