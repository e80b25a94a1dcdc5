"""Tokens as text that can be sent on: whole characters, and nothing that may become a stop sequence."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.engine import Chosen
from loratune.serve.text import Text
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def pieces(ids: list[int], stops: list[str], finish: str = "length") -> tuple[list[str], Text]:
    text = Text(TOKENIZER, stops)
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
