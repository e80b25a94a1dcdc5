"""Rows read as prompts: with or without an answer, sent whole and never cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratune.data.example import hash_of
from loratune.data.read import Example, read
from loratune.data.render import render, render_prompt
from loratune.errors import ConfigError, DataError
from tests.tiny import tiny_tokenizer

CHAT = tiny_tokenizer()
RAW = tiny_tokenizer(None, eos="<|endoftext|>", pad=None)
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"function": {"name": "look", "arguments": {"at": "it"}}}
LONG = "one two three four five six seven " * 20


def prompt(row: dict[str, Any], tokenizer: Any = CHAT) -> tuple[str, str]:
    (example,) = read([row], answers=False).examples
    ids, reference = render_prompt(example, tokenizer)
    return tokenizer.decode(ids), reference


def refused(*rows: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(list(rows), answers=False, **options)
    return caught.value


def asked(*messages: dict[str, str]) -> str:
    return str(CHAT.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "Hi"}, {"completion": "Hello"}),
        ({"prompt": [USER]}, {"completion": [ANSWER]}),
        ({"messages": [USER]}, {"messages": [USER, ANSWER]}),
        ({"messages": json.dumps([USER])}, {"messages": json.dumps([USER, ANSWER])}),
        (
            {"conversations": [{"from": "human", "value": "Hi"}]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        ),
        ({"instruction": "Hi"}, {"output": "Hello"}),
        ({"text": "Hi"}, {"label": "Hello"}),
    ],
)
def test_a_prompt_is_the_same_with_and_without_its_answer(row: dict[str, Any], answer: dict[str, Any]) -> None:
    assert prompt(row) == (asked(USER), "")
    assert prompt(row | answer) == (asked(USER), "Hello")
    (as_trained,) = read([row | answer]).examples
    ids, reference = render_prompt(as_trained, CHAT)
    assert (CHAT.decode(ids), reference) == prompt(row | answer)


@pytest.mark.parametrize("nothing", [None, "", " \n", [], ()])
def test_a_blank_answer_is_none(nothing: Any) -> None:
    for row in ({"prompt": "Hi", "completion": nothing}, {"instruction": "Hi", "input": "", "output": nothing}):
        assert prompt(row) == (asked(USER), "")
        assert not read([row], answers=False).examples[0].answered


def test_answered_and_open_rows_stand_in_one_file() -> None:
    rows = [{"prompt": "Hi"}, {"prompt": "Hi", "completion": "Hello"}, {"prompt": [USER]}]
    corpus = read(rows, answers=False)
    assert [example.answered for example in corpus.examples] == [False, True, False]
    assert corpus.shape == "prompt"


def test_every_turn_is_sent_but_the_answer() -> None:
    again = {"role": "user", "content": "Again"}
    assert prompt({"messages": [USER, ANSWER, again]}) == (asked(USER, ANSWER, again), "")
    # Context in training, the reference here.
    assert prompt({"messages": [USER, ANSWER, again, ANSWER | {"weight": 0}]}) == (asked(USER, ANSWER, again), "Hello")
    # Where it is trained on, the row ends with its last answer.
    (as_trained,) = read([{"messages": [USER, ANSWER, again]}]).examples
    assert render_prompt(as_trained, CHAT)[1] == "Hello"


def test_a_tool_result_may_be_last() -> None:
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "42"}]
    (example,) = read([{"messages": messages}], answers=False).examples
    assert (len(example.messages), example.answered) == (3, False)


def test_a_text_is_never_cut() -> None:
    assert prompt({"text": LONG}) == (asked({"role": "user", "content": LONG}), "")
    assert prompt({"text": LONG}, RAW) == (LONG, "")
    (as_trained,) = read([{"text": LONG}]).examples
    ids, rest = render_prompt(as_trained, RAW)
    assert len(ids) == 32
    assert rest


def test_raw_prompts_are_written_as_in_training() -> None:
    for row in ({"instruction": "Add", "input": "1 2"}, {"prompt": "Add"}):
        answered = row | ({"output": "3"} if "instruction" in row else {"completion": "3"})
        (as_trained,) = read([answered]).examples
        assert prompt(row, RAW)[0] == RAW.decode(render_prompt(as_trained, RAW)[0])
    (chat,) = read([{"messages": [USER]}], answers=False).examples
    with pytest.raises(DataError, match="no chat template"):
        render_prompt(chat, RAW)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_bytes(b"Who?\r\n\r\nWhere is it?\nWhen?")
    examples = read(file, answers=False).examples
    assert [(str(example.place), example.prompt) for example in examples] == [
        ("questions.txt:1", "Who?"),
        ("questions.txt:3", "Where is it?"),
        ("questions.txt:4", "When?"),
    ]
    file.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="no rows"):
        read(file, answers=False)


def test_files(tmp_path: Path) -> None:
    def found(name: str, text: str) -> list[Example]:
        (tmp_path / name).write_text(text)
        return list(read(tmp_path / name, answers=False).examples)

    assert [row.prompt for row in found("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n')] == ["a", "b"]
    assert [row.answered for row in found("a.csv", "prompt,completion\na,b\nc,\n")] == [True, False]
    # One object is one row, and the list in it is no list of rows.
    (row,) = found("a.json", json.dumps({"prompt": [USER]}))
    assert row.messages == (USER,)


def test_an_id_stays_with_its_row() -> None:
    rows = [{"prompt": "a", "id": "q-1"}, {"prompt": "b", "id": 0}, {"prompt": "c"}, {"prompt": "d", "id": None}]
    corpus = read(rows, answers=False)
    assert [example.id for example in corpus.examples] == ["q-1", 0, None, None]
    assert corpus.ignored_columns == ()
    assert "unpaired surrogate" in refused({"prompt": "a", "id": "\ud800"}).problems[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": ""}, "row without a question"),
        ({"prompt": 3}, "column 'prompt' is a number, expected a string"),
        ({"prompt": "a", "completion": [ANSWER]}, "must be both strings or both lists"),
        ({"prompt": [USER, ANSWER]}, "the prompt ends with the assistant's message"),
        ({"prompt": []}, "column 'prompt' has no messages"),
        ({"messages": [ANSWER]}, "the first message is the assistant's"),
        ({"messages": []}, "has no messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "the user message is empty"),
        ({"instruction": " ", "input": ""}, "row without a question"),
        ({"text": " "}, "row without a question"),
    ],
)
def test_bad_prompts(row: dict[str, Any], words: str) -> None:
    error = refused(row)
    assert error.problems[0].startswith("rows:1: ")
    assert words in error.problems[0]


def test_other_columns_can_be_named() -> None:
    error = refused({"question": "a"})
    assert "no known shape has the columns 'question'; known shapes: messages; conversations; prompt;" in str(error)
    assert error.hint == "name them: --columns prompt=question"
    (example,) = read([{"question": "a"}], columns={"prompt": "question"}, answers=False).examples
    assert example.prompt == "a"
    with pytest.raises(ConfigError, match="no row has a column 'querry'"):
        read([{"question": "a"}], columns={"prompt": "querry"}, answers=False)


def test_training_still_needs_answers() -> None:
    for row in ({"prompt": "a"}, {"messages": [USER]}):
        with pytest.raises(DataError):
            read([row])
    examples = read([{"prompt": "a"}, {"prompt": "b"}], answers=False).examples
    for tokenizer in (CHAT, RAW):
        with pytest.raises(DataError) as caught:
            render(examples, tokenizer, max_length=100)
        assert caught.value.problems == ("rows:1: row without an answer", "rows:2: row without an answer")


def test_the_hash_knows_which_rows_have_no_answer_and_not_what_they_call_themselves() -> None:
    (one,) = read([{"prompt": "Hi", "completion": ""}], answers=False).examples
    assert not one.answered
    answered = replace(one, answered=True)
    named = replace(one, id="first", place=replace(one.place, row=7))
    assert hash_of([one]) != hash_of([answered])
    assert hash_of([one, answered]) != hash_of([answered, one])
    assert hash_of([one]) == hash_of([named])
