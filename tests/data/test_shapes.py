"""Which columns become which example, and what is wrong with a row."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratune.data.read import Example, read
from loratune.errors import DataError

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}


def one(row: dict[str, Any]) -> Example:
    return read([row]).examples[0]


def problems_of(*rows: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        read(rows)
    return caught.value.problems


def test_messages_keep_turns_tools_and_what_else_they_say() -> None:
    call = {"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Berlin"}'}}
    schema = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    messages = [
        {"role": "system", "content": ""},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "21", "tool_call_id": "c1", "name": None},
        BOT,
    ]
    example = one({"messages": messages, "tools": [schema]})
    assert example.kind == "chat"
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    function = {"name": "weather", "arguments": {"city": "Berlin"}}
    assert example.messages[2]["tool_calls"] == [{"type": "function", "id": "c1", "function": function}]
    assert example.messages[2]["content"] == ""
    assert dict(example.messages[3]) == {"role": "tool", "content": "21", "tool_call_id": "c1"}
    assert example.tools == (schema,)


def test_content_parts_are_joined_and_other_parts_refused() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert one({"messages": [USER, {"role": "assistant", "content": parts}]}).messages[1]["content"] == "Hello"
    picture = {"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "?"}]}
    (problem,) = problems_of({"messages": [picture, BOT]})
    assert problem == "rows:1: messages[0]: content has a part of type 'image'; only text parts can be trained on"


def test_sharegpt_names_and_function_calls() -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "Hello"},
    ]
    example = one({"conversations": turns, "tools": json.dumps([{"name": "f"}])})
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert example.tools == ({"name": "f"},)
    assert read([{"conversations": turns}]).shape == "conversations"


def test_a_conversation_may_be_json_text() -> None:
    assert one({"messages": json.dumps([USER, BOT])}) == one({"messages": [USER, BOT]})
    assert "not valid JSON" in problems_of({"messages": "Hi"})[0]


def test_pairs() -> None:
    pair = one({"prompt": "a ", "completion": " b"})
    assert (pair.kind, pair.prompt, pair.completion, pair.separator) == ("pair", "a ", " b", "")
    alpaca = one({"instruction": "Add", "input": "1 2", "output": "3"})
    assert (alpaca.kind, alpaca.prompt, alpaca.completion) == ("pair", "Add\n\n1 2", "3")
    assert one({"instruction": "Add", "input": "", "output": "3"}).prompt == "Add"
    assert one({"instruction": "Add", "output": "3"}).prompt == "Add"
    for label, said in (("good", "good"), (3, "3"), (True, "true"), (0.5, "0.5")):
        rated = one({"text": "film", "label": label})
        assert (rated.kind, rated.prompt, rated.completion, rated.separator) == ("pair", "film", said, "\n")
    assert one({"text": "film"}).kind == "text"


def test_prompt_and_completion_messages_learn_the_completion_only() -> None:
    example = one({"prompt": [USER, BOT, USER], "completion": [BOT]})
    assert example.kind == "chat"
    assert [m.get("weight") for m in example.messages] == [None, 0, None, None]
    assert "both strings or both lists" in problems_of({"prompt": [USER], "completion": "b"})[0]


def test_a_richer_shape_is_preferred() -> None:
    row = {"messages": [USER, BOT], "prompt": "Hi", "completion": "Hello", "text": "Hi Hello"}
    corpus = read([row])
    assert corpus.shape == "messages"
    assert corpus.ignored_columns == ("completion", "prompt", "text")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "column 'messages' has no messages"),
        ({"role": "user"}, "column 'messages' is an object, expected a list"),
        (["Hi", USER, BOT], "messages[0] is a string, expected an object"),
        ([USER, {"content": "x"}, BOT], "messages[1] has no 'role'"),
        ([USER, {"role": 1, "content": "x"}, BOT], "messages[1]: role is a number"),
        ([USER, {"role": "assistent", "content": "x"}, BOT], "unknown role 'assistent'; did you mean 'assistant'?"),
        ([USER, {"role": "assistant", "content": 3}], "messages[1]: content is a number"),
        ([{"role": "user", "content": " "}, BOT], "messages[0]: the user message is empty"),
        ([USER, {"role": "assistant", "content": ""}], "messages[1]: the assistant message is empty"),
        ([USER], "row without an answer"),
        ([USER, BOT | {"weight": 0}], "row without an answer"),
        ([USER, BOT | {"weight": 0.5}], "weight is 0.5, expected 0 (context) or 1"),
        ([BOT, USER, BOT], "the first message is the assistant's"),
        ([USER, BOT | {"tool_calls": "f()"}], "tool_calls is a string, expected a list"),
        ([USER, BOT | {"tool_calls": [{"function": {}}]}], "a tool call has no function name"),
        (
            [USER, BOT | {"tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}],
            "arguments of f is a string that is not valid JSON",
        ),
    ],
)
def test_bad_conversations(messages: Any, words: str) -> None:
    found = problems_of({"messages": messages})
    assert all(problem.startswith("rows:1: ") for problem in found)
    assert any(words in problem for problem in found), found


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": " \n"}, "row without an answer: the completion is empty"),
        ({"prompt": "", "completion": "b"}, "row without a question: the prompt is empty"),
        ({"prompt": 3, "completion": "b"}, "column 'prompt' is a number, expected a string"),
        ({"instruction": "", "input": "", "output": "b"}, "the prompt is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "column 'input' is a number"),
        ({"text": ""}, "column 'text' is empty"),
        ({"text": ["a"]}, "column 'text' is a list"),
        ({"text": "a", "label": None}, "column 'label' is null"),
        ({"messages": [USER, BOT], "tools": "weather"}, "tools is a string that is not valid JSON"),
        ({"messages": [USER, BOT], "tools": [3]}, "'tools' is a list, expected a list of tool schemas"),
    ],
)
def test_bad_rows(row: dict[str, Any], words: str) -> None:
    found = problems_of(row)
    assert any(words in problem for problem in found), found


def test_rows_of_another_shape_are_named_against_the_majority() -> None:
    chat = {"messages": [USER, BOT]}
    found = problems_of({"text": "x"}, chat, chat, {"prompt": "a"}, {"messages": [USER]})
    assert [problem.split(": ")[0] for problem in found] == ["rows:1", "rows:4", "rows:5"]
    assert "has no 'messages', which the other rows have" in found[0]
    found = problems_of({"text": "x"}, {"text": "x"}, {"text": "x", "label": 1})
    assert found == ("rows:3: is text/label, the other rows are text: it also has 'label'",)
