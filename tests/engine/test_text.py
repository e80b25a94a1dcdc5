"""Tokens as text that can be sent on: whole characters, and nothing that may become a stop sequence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.engine import Chosen
from loratune.engine.text import Text
from tests.serve.conftest import spelled
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def pieces(
    ids: list[int], stops: list[str], finish: str = "length", tokenizer: Any = TOKENIZER
) -> tuple[list[str], Text]:
    text = Text(tokenizer, stops)
    given_out = []
    for place, token in enumerate(ids):
        last = finish if place == len(ids) - 1 else None
        given_out.append(text.add(Chosen(0, token, last)))  # type: ignore[arg-type]
        if text.finish is not None:
            break
    return given_out, text


@settings(derandomize=True, max_examples=150, deadline=None)
@given(content=st.text(min_size=1, max_size=30), stops=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_the_pieces_are_the_text_up_to_the_first_stop(content: str, stops: list[str]) -> None:
    ids = list(TOKENIZER(content, add_special_tokens=False)["input_ids"])
    if not ids:
        return
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    given_out, text = pieces(ids, stops)
    found = "".join(given_out)
    assert found == text.written
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert found == whole[: min(ends)] if ends else found == whole
    assert text.finish == ("stop" if ends else "length")


def test_half_a_character_waits_for_its_other_half() -> None:
    ids = list(TOKENIZER("é🙂", add_special_tokens=False)["input_ids"])
    assert len(ids) > 2
    given_out, _ = pieces(ids, [])
    assert "".join(given_out) == "é🙂"
    assert not any("\ufffd" in piece for piece in given_out)
    cut, _ = pieces(ids[:-1], [])
    assert "".join(cut).startswith("é")


def test_a_stop_token_is_no_text() -> None:
    given_out, text = pieces([50, 51, 1], [], "stop")
    assert "".join(given_out) == TOKENIZER.decode([50, 51])
    assert text.finish == "stop"


@pytest.mark.parametrize("ids", [["a", "b", "c"], ["ab", "c"], ["a", "bc"], ["abc"]], ids=str)
def test_the_earliest_stop_ends_wherever_tokens_end(ids: list[str]) -> None:
    """One stop sequence inside another: what is given out does not hang on how the text came in tokens."""
    tokenizer = spelled({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "x": 6})
    numbers = tokenizer.convert_tokens_to_ids(["x", *ids, "x"])
    given_out, text = pieces(numbers, ["abc", "b"], tokenizer=tokenizer)
    assert "".join(given_out) == "x"
    assert text.finish == "stop"
    other, text = pieces(tokenizer.convert_tokens_to_ids(["a", "b", "x"]), ["abc", "b"], tokenizer=tokenizer)
    assert "".join(other) == "a"


def test_bytes_that_are_no_character_break_nothing() -> None:
    """A byte that makes a run of bytes no character changes text that was given out already."""
    tokenizer = spelled({"<0x41>": 0, "<0xFF>": 1, "\u2581x": 2}, sentencepiece=True)
    given_out, text = pieces([2, 0, 1, 2, 2], [], tokenizer=tokenizer)
    assert text.finish == "length"
    assert "".join(given_out).startswith("x")
    assert "".join(given_out).endswith(" x x")


def test_what_is_never_a_character_is_given_out_in_time() -> None:
    """Each token is decoded a few times, however long no character ends."""
    tokenizer = spelled({"<0xFF>": 0, "\u2581x": 1}, sentencepiece=True)
    text = Text(tokenizer, [])
    seen = []
    backend = text._decoder

    class Counting:
        def decode(self, ids: list[int], **how: Any) -> str:
            seen.append(len(ids))
            return str(backend.decode(ids, **how))

    text._decoder = Counting()
    for place in range(1000):
        text.add(Chosen(0, 0, "length" if place == 999 else None))
    assert len(text.written) == 1000
    assert sum(seen) < 40 * 1000


@settings(derandomize=True, max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=30))
def test_any_tokens_are_their_text(ids: list[int]) -> None:
    """Special ones and halves of characters too, with where the text of each begins."""
    text = Text(TOKENIZER, [])
    told: list[tuple[int, Chosen]] = []
    for place, token in enumerate(ids):
        text.add(Chosen(0, token, "length" if place == len(ids) - 1 else None))
        told += text.told()
    assert text.written == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert [one.token for _, one in told] == ids
    offsets = [offset for offset, _ in told]
    assert offsets == sorted(offsets)
    for place, offset in enumerate(offsets):
        before = TOKENIZER.decode(ids[:place], skip_special_tokens=True)
        if "\ufffd" not in before:
            assert offset == len(before)


def test_the_tokens_of_what_was_cut_off_are_not_told() -> None:
    tokenizer = spelled({"a": 0, "b": 1, "c": 2, "xb": 3})
    text = Text(tokenizer, ["bc"])
    told = []
    for token in (0, 3, 2):
        text.add(Chosen(0, token, None))
        told += text.told()
    assert text.written == "ax"
    assert [(offset, one.token) for offset, one in told] == [(0, 0), (1, 3)]


def test_an_answer_that_continues_a_text_keeps_its_space() -> None:
    """SentencePiece leaves out the space that a text begins with, and this one begins in the prompt."""
    tokenizer = spelled({"\u2581a": 0, "\u2581b": 1, "c": 2}, sentencepiece=True)
    for after, expected in (((), "bc"), ((0,), " bc"), ((0, 1, 0), " bc")):
        text = Text(tokenizer, [], after)
        assert [text.add(Chosen(0, 1, None)), text.add(Chosen(0, 2, "length"))] == [expected[:-1], "c"]
        assert [offset for offset, _ in text.told()] == [0, len(expected) - 1]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(content=st.text(min_size=1, max_size=30), after=st.text(max_size=60))
def test_what_was_before_changes_nothing_else(content: str, after: str) -> None:
    ids, before = (list(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in (content, after))
    text = Text(TOKENIZER, [], before)
    for place, token in enumerate(ids):
        text.add(Chosen(0, token, "length" if place == len(ids) - 1 else None))
    assert text.written == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_half_a_character_of_the_prompt_is_ended_by_the_answer() -> None:
    """Who gives token ids may end anywhere; the character is the answer's then."""
    ids = list(TOKENIZER("é你x", add_special_tokens=False)["input_ids"])
    for cut in range(len(ids)):
        text = Text(TOKENIZER, [], ids[:cut])
        for place, token in enumerate(ids[cut:]):
            text.add(Chosen(0, token, "length" if place == len(ids) - cut - 1 else None))
        before = TOKENIZER.decode(ids[:cut]).rstrip("\ufffd")
        assert before + text.written == "é你x"
