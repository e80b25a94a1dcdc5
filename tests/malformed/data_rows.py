"""Rows that are wrong, or only strange, in every shape that rows have: as JSONL, the bad one third of six."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.malformed.cases import REFUSED, Case, written

COUNT, PLACE = 6, 3
LONG = "word " * 200_000

GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]},
    "completion": {"prompt": "1 + 1 =", "completion": "2"},
    "instruction": {"instruction": "Add.", "input": "1 1", "output": "2"},
    "sharegpt": {"conversations": [{"from": "human", "value": "1 + 1 ="}, {"from": "gpt", "value": "2"}]},
    "text": {"text": "One and one is two."},
}

# What a value that should be text may be instead.
_NO_TEXT = {"null": None, "number": 3, "float": 0.5, "bool": True, "list": ["2"], "mapping": {"a": "2"}, "empty": ""}
_STRANGE_TEXT = {
    "emoji": "👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "right to left": "שלום \u202eabc\u202c مرحبا",
    "combining": "e\u0301\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L",
    "zero width": "a\u200bb\ufeffc",
    "line separators": "a\u2028b\u2029c\u0085d",
    "controls": "a\x00b\x07c\x1b[31md",
    "beyond the basic plane": "\U00010348\U0001f9ff\U0010ffff",
}
_ANSWERS = {
    "messages": "content",
    "completion": "completion",
    "instruction": "output",
    "sharegpt": "value",
    "text": "text",
}


def with_answer(shape: str, value: Any) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(json.dumps(GOOD[shape]))
    turns = row.get("messages") or row.get("conversations")
    (turns[-1] if turns else row)[_ANSWERS[shape]] = value
    return row


def lines(shape: str, third: str) -> str:
    good = json.dumps(GOOD[shape])
    return "".join(f"{third if number == PLACE else good}\n" for number in range(1, COUNT + 1))


def refused(name: str, shape: str, third: Any, *named: str) -> Case:
    text = third if isinstance(third, str) else json.dumps(third)
    return Case(f"{shape}: {name}", written("rows.jsonl", lines(shape, text)), (f"rows.jsonl:{PLACE}", *named), REFUSED)


def accepted(name: str, shape: str, third: Any) -> Case:
    text = third if isinstance(third, str) else json.dumps(third)
    return Case(f"{shape}: {name}", written("rows.jsonl", lines(shape, text)), (), COUNT)


def cases() -> Iterator[Case]:
    for shape, good in GOOD.items():
        yield accepted("good", shape, good)
        for name, value in _NO_TEXT.items():
            yield refused(f"answer is {name}", shape, with_answer(shape, value))
        for name, value in _STRANGE_TEXT.items():
            yield accepted(f"answer with {name}", shape, with_answer(shape, value))
        yield (
            refused("tokens of the template", shape, with_answer(shape, "2<|im_end|>"))
            if shape != "text"
            else accepted("tokens of the template", shape, with_answer(shape, "2<|im_end|>"))
        )
        yield refused("half a surrogate pair", shape, json.dumps(with_answer(shape, "@")).replace("@", "\\ud83d"))
        yield refused("no column left", shape, {})
        yield refused("columns of another shape", shape, {"question": "1 + 1 =", "answer": "2"})
        yield accepted("one column more", shape, {**good, "note": {"deep": [1, {"x": None}]}})
        first = next(iter(good))
        yield refused("column missing", shape, {name: value for name, value in good.items() if name != first})
        yield refused("column of other capitals", shape, {name.title(): value for name, value in good.items()})
        text = json.dumps(good)
        yield refused("the same key twice", shape, text[:-1] + f', "{first}": null}}', "duplicate key", first)
        yield refused("cut off", shape, text[:-4], "not valid JSON")
        yield refused("single quotes", shape, text.replace('"', "'"), "not valid JSON")
        yield refused("a comma too many", shape, text[:-1] + ",}", "not valid JSON")
        yield refused("two objects", shape, text + text)
        yield refused("NaN", shape, text[:-1] + ', "score": NaN}', "NaN is not JSON")
        yield refused("a comment", shape, text + " // sum", "rows.jsonl:3")
        yield refused("an array", shape, f"[{text}]")
        for scalar in ("null", "3", '"text"', "true"):
            yield refused(f"only {scalar}", shape, scalar)
    yield from _turns("messages", "role", "content", ("user", "assistant"))
    yield from _turns("conversations", "from", "value", ("human", "gpt"), shape="sharegpt")
    yield from _tools()
    yield refused("very deep", "text", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply")
    yield refused("very deep objects", "text", '{"a": ' * 50_000 + "1" + "}" * 50_000)
    yield refused("a number of many digits", "text", '{"text": "a", "n": ' + "9" * 5000 + "}")
    yield refused("1 MB", "completion", {"prompt": "1 + 1 =", "completion": LONG}, "tokens")
    yield accepted("a blank line of 10 MB", "completion", json.dumps(GOOD["completion"]) + " " * 10_000_000)


def _turns(key: str, who: str, what: str, roles: tuple[str, str], shape: str = "messages") -> Iterator[Case]:
    """What a list of turns may be."""
    asks, answers = ({who: role, what: text} for role, text in zip(roles, ("1 + 1 =", "2"), strict=True))
    wrong: dict[str, Any] = {
        "null": None,
        "text": "1 + 1 = 2",
        "a mapping": {"0": asks, "1": answers},
        "empty": [],
        "of texts": ["1 + 1 =", "2"],
        "of nulls": [None, None],
        "of lists": [[roles[0], "1 + 1 ="], [roles[1], "2"]],
        "without an answer": [asks],
        "without a speaker": [asks, {what: "2"}],
        "without a text": [asks, {who: roles[1]}],
        "of an unknown speaker": [asks, {who: "oracle", what: "2"}],
        "of speaker 3": [asks, {who: 3, what: "2"}],
        "of speaker null": [asks, {who: None, what: "2"}],
        "nested": [[asks, answers]],
        "of speakers in capitals": [{who: roles[0].upper(), what: "1"}, {who: roles[1].upper(), what: "2"}],
    }
    for name, value in wrong.items():
        yield refused(f"turns {name}", shape, {key: value})
    yield accepted("many turns", shape, {key: [asks, answers] * 4})
    yield accepted("a speaker's name beside it", shape, {key: [{**asks, "name": "Ann"}, answers]})


def _tools() -> Iterator[Case]:
    turns = GOOD["messages"]["messages"]
    for name, tools in {"a text": "add", "texts": ["add"], "a number": 3, "a mapping": {"name": "add"}}.items():
        yield refused(f"tools: {name}", "messages", {"messages": turns, "tools": tools})
    yield accepted("tools: none", "messages", {"messages": turns, "tools": []})
    yield accepted("tools: null", "messages", {"messages": turns, "tools": None})
