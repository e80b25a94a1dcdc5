"""The public names: listed once, in order, real, and explained."""

from __future__ import annotations

import inspect
import re

import pytest

import loratune
from tests.contract.house import HOUSE, REPOSITORY


def explained(name: str, value: object, pages: str) -> bool:
    """A docstring of its own (not a base's, not a data class's generated one), or its name as code in a page."""
    if re.search(rf"`[^`\n]*\b{re.escape(name)}\b[^`\n]*`", pages):
        return True
    if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
        return False
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    return isinstance(text, str) and text != "" and not text.startswith(f"{name}(")


def docs() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").rglob("*.md")))


def test_all_is_sorted_and_unique() -> None:
    assert list(loratune.__all__) == sorted(set(loratune.__all__))


def test_dir_lists_every_export() -> None:
    assert set(loratune.__all__) <= set(dir(loratune))


def test_no_export_is_called_like_a_room() -> None:
    """Importing `loratune.x` sets the attribute `x` of the package: a lazy export `x` would be lost."""
    assert set(loratune.__all__).isdisjoint(HOUSE.lines)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = loratune.no_such_name


@pytest.mark.parametrize("name", loratune.__all__)
def test_export_resolves_and_is_explained(name: str) -> None:
    assert explained(name, getattr(loratune, name), docs()), f"{name} has no docstring and stands in no page of docs/"


def test_guard_sees_a_missing_explanation() -> None:
    class Bare:
        pass

    class InheritsError(ValueError):
        pass

    assert not explained("Bare", Bare, "Bare, but not as code")
    assert not explained("InheritsError", InheritsError, "")
    assert not explained("LIMIT", 3, "")
    assert explained("Bare", Bare, "see `lt.Bare(x)`")
    assert explained("explained", explained, "")
