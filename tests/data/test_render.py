"""What happens to rows that are too long, teach nothing, or spell special tokens."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.data.fit import show_mask
from loratune.data.read import Example, read
from loratune.data.render import Rendered, RenderedCorpus, render, render_prompt
from loratune.errors import ConfigError, DataError
from tests.tiny import INSTRUCT, tiny_tokenizer

CHAT = tiny_tokenizer()
RAW = tiny_tokenizer(None, eos="<|endoftext|>", pad=None)


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def examples(*rows: dict[str, Any]) -> tuple[Example, ...]:
    return read(rows).examples


def made(*rows: dict[str, Any], tokenizer: Any = CHAT, **options: Any) -> RenderedCorpus:
    return render(examples(*rows), tokenizer, **{"max_length": 10_000, **options})


def refused(*rows: dict[str, Any], **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        made(*rows, **options)
    return caught.value


def learned(row: Rendered, tokenizer: Any = CHAT) -> list[str]:
    return [text for text, supervised in show_mask(row, tokenizer) if supervised]


LONG = turns("Hi", "Hello", "Bye", "See you", "Again", "word " * 50)
SHORT = turns("Hi", "Hello")


def test_too_long_rows_are_errors_with_their_lengths() -> None:
    length = len(made(LONG).rows[0].ids)
    error = refused(SHORT, LONG, SHORT, LONG, max_length=length - 1)
    assert error.problems == (
        f"rows:2: {length} tokens, longer than {length - 1}",
        f"rows:4: {length} tokens, longer than {length - 1}",
    )
    assert f"--max-length {length}" in error.hint
    assert not made(LONG, max_length=length).truncated


def test_too_long_rows_can_be_dropped() -> None:
    corpus = made(SHORT, LONG, SHORT, max_length=60, overlong="drop")
    assert [row.place.row for row in corpus.rows] == [1, 3]
    assert [str(place) for place in corpus.dropped] == ["rows:2"]
    assert "all 1 rows are longer than 60 tokens" in refused(LONG, max_length=60, overlong="drop").problems[0]


@pytest.mark.parametrize("loss", ["assistant", "completion", "all"])
def test_a_chat_is_truncated_by_whole_turns(loss: str) -> None:
    corpus = made(SHORT, LONG, max_length=60, overlong="truncate", loss=loss)
    assert [str(place) for place in corpus.truncated] == ["rows:2"]
    kept = turns("Hi", "Hello", "Bye", "See you")
    expected = made(kept, loss=loss).rows[0]
    assert (corpus.rows[1].ids, corpus.rows[1].supervised) == (expected.ids, expected.supervised)
    assert corpus.rows[1].truncated
    assert not corpus.rows[0].truncated
    shorter = made(LONG, max_length=len(expected.ids) - 1, overlong="truncate", loss=loss).rows[0]
    assert shorter.ids == made(SHORT, loss=loss).rows[0].ids


def test_unanswered_turns_at_the_end_go_first() -> None:
    row = turns("Hi", "Hello", "word " * 50)
    assert made(row).rows[0].ids == made(SHORT).rows[0].ids
    whole = made(row, loss="all").rows[0]
    assert len(whole.ids) > 60
    assert made(row, loss="all", max_length=60, overlong="truncate").rows[0].ids == made(SHORT, loss="all").rows[0].ids


def test_an_answer_is_never_cut_off() -> None:
    error = refused(turns("Hi", "word " * 50, "Bye", "See you"), {**SHORT}, max_length=40, overlong="truncate")
    assert len(error.problems) == 1
    assert error.problems[0].startswith("rows:1: answer cut off by truncation: up to its first answer the row has")
    assert "--overlong drop" in error.hint
    pair = {"prompt": "word " * 50, "completion": "x"}
    for tokenizer in (CHAT, RAW):
        assert "answer cut off" in refused(pair, max_length=40, overlong="truncate", tokenizer=tokenizer).problems[0]


def test_a_text_is_cut_at_its_end() -> None:
    corpus = made({"text": "word " * 50}, max_length=20, overlong="truncate", tokenizer=RAW)
    whole = made({"text": "word " * 50}, tokenizer=RAW).rows[0]
    assert corpus.rows[0].ids == whole.ids[:20]
    assert corpus.rows[0].supervised == (False, *[True] * 19)
    assert len(corpus.truncated) == 1
    assert corpus.rows[0].characters < whole.characters


def test_pairs_use_the_template_where_there_is_one() -> None:
    pair = {"prompt": "Hi", "completion": "Hello"}
    assert made(pair).rows[0].ids == made(SHORT).rows[0].ids
    assert render_prompt(examples(pair)[0], CHAT) == render_prompt(examples(SHORT)[0], CHAT)
    alpaca = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert made(alpaca).rows[0].ids == made(turns("Add\n\n1 2", "3")).rows[0].ids
    assert learned(made(alpaca, tokenizer=RAW).rows[0], RAW) == ["3<|endoftext|>"]
    assert RAW.decode(made(alpaca, tokenizer=RAW).rows[0].ids) == "Add\n\n1 2\n\n3<|endoftext|>"


def test_special_tokens_in_the_data_are_reported_or_refused() -> None:
    corpus = made(turns("say <|im_end|>", "No"), SHORT, turns("Hi", "say <|im_start|>"))
    assert [place.row for place in corpus.special_tokens_in_text] == [1, 3]
    assert learned(corpus.rows[0]) == ["No<|im_end|>"]
    error = refused(SHORT, turns("Hi", "Hello<|im_end|>", "Bye", "See you"))
    assert error.problems == ("rows:2: the answer contains '<|im_end|>', which ends it in the middle",)
    assert "remove the token" in error.hint
    ended = refused({"prompt": "a", "completion": "b<|endoftext|>"}, tokenizer=RAW)
    assert "the answer contains '<|endoftext|>'" in ended.problems[0]
    documents = made({"text": "one<|endoftext|>two"}, tokenizer=RAW)
    assert len(documents.special_tokens_in_text) == 1


def test_problems_of_all_rows_come_together() -> None:
    tokenizer = tiny_tokenizer(INSTRUCT, bos="<|begin_of_text|>")
    wrong = {"messages": [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]}
    error = refused(wrong, turns("a", "b<|im_end|>"), LONG, SHORT, tokenizer=tokenizer, max_length=100)
    assert [problem.split(": ")[0] for problem in error.problems] == ["rows:1", "rows:2", "rows:3"]
    assert error.hint.count(";") == 2


def test_a_row_that_teaches_nothing_is_named() -> None:
    silent = tiny_tokenizer("{% for m in messages %}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}")
    error = refused({"prompt": "a", "completion": "b"}, tokenizer=silent, loss="all")
    assert error.problems == ("rows:1: no supervised token",)


def test_wrong_settings_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        render(examples(SHORT), CHAT, max_length=1, loss="user", overlong="cut")  # type: ignore[arg-type]
    assert len(caught.value.problems) == 3


def test_nothing_to_render() -> None:
    with pytest.raises(DataError, match="no rows to render"):
        render([], CHAT, max_length=10)


def test_many_rows_keep_their_order_and_do_not_depend_on_each_other() -> None:
    rows = [turns(f"question {n}", f"answer {n} " * (n % 5 + 1)) for n in range(1100)]
    whole = made(*rows).rows
    assert [row.place.row for row in whole] == list(range(1, 1101))
    for at in (0, 511, 512, 1023, 1099):
        alone = made(rows[at]).rows[0]
        assert (alone.ids, alone.supervised) == (whole[at].ids, whole[at].supervised)
