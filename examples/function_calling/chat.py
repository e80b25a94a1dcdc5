"""Writes a question as a chat: compact signatures and the question in, one JSON call out.

Every token costs training time, so a function is one line with types, choices and defaults instead of a JSON schema:

    weather {"place": str (City, State), "unit"?: "celsius"|"fahrenheit"}

It has the form of the arguments in the answer, quotes and spaces included, since the model copies tokens, not letters:
written as in Python, `place` and ` unit` after its comma would be other tokens than those in the call.

    {"name": "weather", "arguments": {"place": "Berkeley, CA"}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from accepted import LEFT_OUT, Accepted, Argument
from questions import Question

# Without a system message the template of SmolLM2 puts in one of its own, which is longer and says less.
SYSTEM = "Answer with one JSON function call."

TYPE_NAMES = {"string": "str", "integer": "int", "boolean": "bool", "array": "list", "tuple": "list"}
MAX_DESCRIPTION = 60  # characters: enough to tell functions apart
# What a description says about the form of a value: "in the format of 'City, State'", "in format YYYY-MM-DD".
FORM = re.compile(r"format(?: of)?:? (?:(['\"])(.{3,30}?)\1|([A-Z][^'\".;()]{2,30}))")


def messages(question: Question) -> list[dict[str, str]]:
    """The question as system, user and assistant messages."""
    # A description tells functions apart; where there is one function, it would only cost tokens.
    described = len(question.functions) > 1
    offered = "\n".join(signature(function, described=described) for function in question.functions)
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{offered}\n\n{question.text}"},
        {"role": "assistant", "content": answer(question.accepted, question.text)},
    ]


def signature(function: Mapping[str, Any], *, described: bool) -> str:
    """One line for one function: its name, its arguments with types, choices and defaults, perhaps a description."""
    required = function["parameters"]["required"]
    properties = function["parameters"]["properties"]
    arguments = ", ".join(_argument(key, properties[key], key in required) for key in properties)
    line = f"{function['name']} {{{arguments}}}"
    return f"{line} # {_shortened(function['description'])}" if described else line


def answer(accepted: Accepted, question: str) -> str:
    """The canonical right call, on one line.

    Of several accepted values the one that stands in the question is taken, since copying can be learnt and guessing a
    preferred spelling cannot; else the first. An argument that may be left out is there only if its value is so
    stated: then leaving it out would teach to overlook what was asked for.
    """
    arguments = {}
    for key, argument in accepted.arguments.items():
        stated = _stated(argument, question)
        if stated is not None:
            arguments[key] = stated
        elif not argument.optional:
            arguments[key] = _first(argument)
    return json.dumps({"name": accepted.name, "arguments": arguments}, ensure_ascii=False)


def _argument(key: str, schema: Mapping[str, Any], required: bool) -> str:
    kind = _kind(schema)
    form = None if "enum" in schema else FORM.search(schema.get("description", ""))
    if form:
        kind += f" ({(form[2] or form[3]).strip()})"
    if required:
        return f'"{key}": {kind}'
    if schema.get("default") is None:
        return f'"{key}"?: {kind}'
    return f'"{key}": {kind} = {_compact(schema["default"])}'


def _kind(schema: Mapping[str, Any]) -> str:
    name: str = schema["type"]
    if name in ("array", "tuple"):
        return f"list[{_kind(schema['items'])}]"
    if schema.get("enum"):
        return "|".join(map(_compact, schema["enum"]))
    if name == "dict" and schema.get("properties"):
        parts = (_argument(key, part, required=True) for key, part in schema["properties"].items())
        return "{" + ", ".join(parts) + "}"
    return TYPE_NAMES.get(name, name)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shortened(description: str) -> str:
    sentence = re.split(r"(?<=[a-z)])\.\s|\n", description.strip(), maxsplit=1)[0].rstrip(".")
    if len(sentence) <= MAX_DESCRIPTION:
        return sentence
    return sentence[:MAX_DESCRIPTION].rsplit(" ", 1)[0].rstrip(",;:(")


def _stated(argument: Argument, question: str) -> str | int | float | None:
    """The first accepted value that stands in the question, as a word of its own: a 5 does not stand in "1500"."""
    for value in argument.values:
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == LEFT_OUT:
            continue
        written = re.escape(value if isinstance(value, str) else f"{value:g}")
        if re.search(rf"(?<![\w.]){written}(?!\w|\.\d)", question, re.IGNORECASE):
            return value
    return None


def _first(argument: Argument) -> Any:
    return _plain(next((value for value in argument.values if value != LEFT_OUT), LEFT_OUT))


def _plain(value: Any) -> Any:
    """A value to write from an accepted one: a dict holds, for each of its keys, a list of accepted values."""
    if isinstance(value, dict):
        return {
            key: next((choice for choice in choices if choice != LEFT_OUT), LEFT_OUT)
            for key, choices in value.items()
            if LEFT_OUT not in choices
        }
    return [_plain(item) for item in value] if isinstance(value, list) else value
