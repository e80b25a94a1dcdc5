"""Whether a value is one of an argument's accepted values, by the rules of the leaderboard's AST checker.

- Text is compared without case, spaces and the marks `, . / - _ * ^`, and ' counts as ".
- A whole number stands for a float, but a float never for an integer, nor a boolean for either.
- Lists are equal in order and length, their text compared as above; [] stands for a list that may be left out.
- A dict needs every key that may not be left out, no other key, and an accepted value for each.
- Where the accepted values have another type than the declared one, they must be met as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accepted import LEFT_OUT, Argument

PYTHON_TYPES: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_IGNORED = str.maketrans({**dict.fromkeys(" ,./-_*^"), "'": '"'})


def is_accepted(value: Any, argument: Argument) -> bool:
    """Whether a value parsed from JSON is right for the argument."""
    declared = PYTHON_TYPES[argument.type]
    if declared is float and type(value) is int:
        value = float(value)
    listed = _type_of_first(argument.values)
    given: type = type(value)  # and no isinstance: True is an int to it
    if listed is not None and listed is not declared:
        return given in (declared, listed) and value in argument.values
    if given is not declared:
        return False
    if declared is str:
        return _plain(value) in [_plain(choice) for choice in argument.values if isinstance(choice, str)]
    if declared is dict:
        return any(_dict_accepted(value, choice) for choice in argument.values if choice != LEFT_OUT)
    if declared is list:
        return any(_list_accepted(value, choice, argument.items) for choice in argument.values)
    return value in argument.values


def _list_accepted(value: Sequence[Any], choice: Any, items: str | None) -> bool:
    if choice == LEFT_OUT:
        return len(value) == 0
    if len(value) != len(choice):
        return False
    types = {PYTHON_TYPES[items] if items else None, _type_of_first(choice)}
    if not all(type(item) in types for item in value):
        return False
    if items == "dict":
        return all(map(_dict_accepted, value, choice))
    return [_plain(item) for item in value] == [_plain(item) for item in choice]


def _dict_accepted(value: Mapping[str, Any], choice: Mapping[str, Sequence[Any]]) -> bool:
    if any(key not in value and LEFT_OUT not in choices for key, choices in choice.items()):
        return False
    return all(key in choice and _plain(item) in map(_plain, choice[key]) for key, item in value.items())


def _type_of_first(values: Sequence[Any]) -> type | None:
    return next((type(value) for value in values if value != LEFT_OUT), None)


def _plain(value: Any) -> Any:
    return value.translate(_IGNORED).lower() if isinstance(value, str) else value
