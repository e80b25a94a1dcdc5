"""JSON into frozen dataclasses. What is absent or null takes the field's default; what has another type is a problem.

A field's JSON name is its own unless `metadata={"key": …}` says otherwise. Unknown keys are left alone: a later
loratune may record more than this one shows.
"""

from __future__ import annotations

import dataclasses
import types
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_LARGEST = 10**308  # the next power of ten is no float64
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def decode(kind: type[T], value: Any, place: str, problems: list[str]) -> T:
    """An instance of the dataclass `kind`; each wrong value adds a sentence to `problems` and reads as absent.

    Args:
        place: what stands before a key in a problem: `record.json: data`.
    """
    if not isinstance(value, dict):
        problems.append(f"{place} is {_shown(value)}, not an object")
        return kind()
    found = {}
    for name, key, hint in _fields_of(kind):  # type: ignore[arg-type]  # classes are hashable
        if value.get(key) is None:
            continue
        read = _read(hint, value[key], f"{place}.{key}", problems)
        if read is not None:
            found[name] = read
    return kind(**found)


@cache
def _fields_of(kind: type) -> tuple[tuple[str, str, Any], ...]:
    """(field, its key in JSON, its type) of each field."""
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)
    return tuple((field.name, field.metadata.get("key", field.name), hints[field.name]) for field in fields)


def _read(hint: Any, value: Any, place: str, problems: list[str]) -> Any:
    """`value` as the type `hint`; None where it is not of that type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return _read(inner, value, place, problems)
    if origin is tuple:
        if not isinstance(value, list):
            problems.append(f"{place} is {_shown(value)}, not a list")
            return None
        items = [_read(arguments[0], item, f"{place}[{number}]", problems) for number, item in enumerate(value)]
        return tuple(item for item in items if item is not None)
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(f"{place} is {_shown(value)}, not an object")
            return None
        known = {key: item for key, item in value.items() if item is not None}
        read = {key: _read(arguments[1], item, f"{place}.{key}", problems) for key, item in known.items()}
        return {key: item for key, item in read.items() if item is not None}
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, place, problems)  # type: ignore[arg-type]
    return _scalar(hint, value, place, problems)


def _scalar(kind: type, value: Any, place: str, problems: list[str]) -> Any:
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if kind is float and type(value) is int and abs(value) < _LARGEST:
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    problems.append(f"{place} is {_shown(value)}, not {_NAMES[kind]}")
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
