"""Conversations as people store them, brought to one form: `role`, `content`, and what else a turn has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loratune.errors import nearest

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}

Message = dict[str, Any]
_NAMES = {"role", "from", "content", "value"}


def conversation(value: object, column: str, problems: list[str]) -> tuple[Message, ...]:
    """The messages of one row, in canonical form.

    Accepts `{role, content}` and `{from, value}` items, and the whole list as a JSON string (CSV and Parquet files
    hold it so). What is wrong is appended to `problems`, each a sentence without its place.
    """
    value = parsed(value, column, problems)
    if not isinstance(value, list | tuple):
        if value is not None:
            problems.append(f"column {column!r} is {kind(value)}, expected a list of messages")
        return ()
    if not value:
        problems.append(f"column {column!r} has no messages")
    found = [_message(item, f"{column}[{index}]", problems) for index, item in enumerate(value)]
    return tuple(message for message in found if message is not None)


def tools(value: object, problems: list[str]) -> tuple[Mapping[str, Any], ...] | None:
    """The row's tool schemas, or None where it has none."""
    value = parsed(value, "tools", problems) if value not in (None, "") else None
    if value is None or value in ([], ()):
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        problems.append(f"column 'tools' is {kind(value)}, expected a list of tool schemas")
        return None
    return tuple(value)


def answers(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the assistant turns to learn from."""
    return [
        index for index, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0
    ]


def check_conversation(messages: tuple[Mapping[str, Any], ...], problems: list[str]) -> None:
    """What a conversation as a whole must have: someone to answer, and an answer."""
    if not messages:
        return
    if messages[0]["role"] == "assistant":
        problems.append("the first message is the assistant's: it answers nothing")
    if not any(says_something(messages[index]) for index in answers(messages)):
        problems.append("row without an answer: no assistant message with content")


def says_something(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _message(item: object, where: str, problems: list[str]) -> Message | None:
    if not isinstance(item, Mapping):
        problems.append(f"{where} is {kind(item)}, expected an object with 'role' and 'content'")
        return None
    said = item.get("role", item.get("from"))
    if said is None:
        problems.append(f"{where} has no 'role'")
        return None
    if not isinstance(said, str):
        problems.append(f"{where}: role is {kind(said)}, expected a string")
        return None
    if said not in ROLES:
        problems.append(f"{where}: unknown role {said!r}{nearest(said, tuple(ROLES))}")
        return None
    message: Message = {"role": ROLES[said], "content": ""}
    content = item.get("content", item.get("value"))
    if said == "function_call":
        content, message["tool_calls"] = "", [parsed(content, where, problems)]
    message["content"] = _content(content, where, problems)
    # Arrow gives every message the columns of all the others, as nulls; a template takes a null for a value.
    message |= {key: value for key, value in item.items() if key not in _NAMES and value is not None}
    _check_weight(message, where, problems)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where, problems)
        if not message["tool_calls"]:
            del message["tool_calls"]
    if message["role"] in ("user", "assistant") and not says_something(message):
        # An answer without text may be an empty string in a row with other answers, but never teaches anything.
        problems.append(f"{where}: the {message['role']} message is empty")
    return message


def _content(value: object, where: str, problems: list[str]) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return checked_text(value, f"{where}: content", problems)
    if not isinstance(value, list | tuple):
        problems.append(f"{where}: content is {kind(value)}, expected a string")
        return ""
    texts = []
    for part in value:
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(checked_text(part["text"], f"{where}: content", problems))
        else:
            what = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else f"that is {kind(part)}"
            problems.append(f"{where}: content has a part {what}; only text parts can be trained on")
    return "".join(texts)


def _check_weight(message: Message, where: str, problems: list[str]) -> None:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        problems.append(f"{where}: weight is {weight!r}, expected 0 (context) or 1 (learn from it)")


def _tool_calls(value: object, where: str, problems: list[str]) -> list[Message]:
    """Calls as `{"type": "function", "function": {"name", "arguments"}}` with arguments as an object.

    The OpenAI format stores arguments as a JSON string, but templates serialise them themselves: a string would be
    quoted twice.
    """
    if not isinstance(value, list | tuple):
        problems.append(f"{where}: tool_calls is {kind(value)}, expected a list")
        return []
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problems.append(f"{where}: a tool call has no function name")
            continue
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parsed(arguments or "{}", f"{where}: arguments of {function['name']}", problems)
        outer = {key: item for key, item in call.items() if key in ("id", "type") and item is not None}
        calls.append({"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}})
    return calls


def parsed(value: object, where: str, problems: list[str]) -> object:
    """`value`, or what it says if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        problems.append(f"{where} is a string that is not valid JSON ({error})")
        return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # the last would win
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in found if names.count(name) > 1)!r}")
    return found


def checked_text(value: str, where: str, problems: list[str]) -> str:
    """`value`, reported where it cannot be encoded (JSON allows half a surrogate pair, UTF-8 does not)."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problems.append(f"{where} has an unpaired surrogate at character {error.start + 1}")
        return ""
    return value


def kind(value: object) -> str:
    """What a JSON value is, as a phrase."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", tuple: "a list"}
    if isinstance(value, Mapping):
        return "an object"
    return names.get(type(value), f"a {type(value).__name__}")
