"""A file has one reason to change and fits in a head; a function fits on a screen; nothing is left to do later."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.house import PACKAGE, REPOSITORY

NO_NAME = re.compile(r"^_?(.*_)?(utils?|helpers?|common|misc)$")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK|raise NotImplementedError)\b")
FILE_LINES = 400
FUNCTION_LINES = 60


def nameless(paths: Iterator[Path]) -> list[str]:
    return sorted({part for path in paths for part in path.with_suffix("").parts if NO_NAME.match(part)})


def defects(path: Path, text: str) -> list[str]:
    """What is too long or unfinished in one source file, as `path:line reason`."""
    lines = text.splitlines()
    found = [f"{path}:1 has {len(lines)} lines, {FILE_LINES} at most"] if len(lines) > FILE_LINES else []
    for number, line in enumerate(lines, start=1):
        if match := UNFINISHED.search(line):
            found.append(f"{path}:{number} says {match[0]}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{path}:{node.lineno} {node.name} has {length} lines, {FUNCTION_LINES} at most")
    return found


def test_every_module_has_a_name() -> None:
    roots = [REPOSITORY / name for name in ("src", "tests", "examples", "benchmarks")]
    assert nameless(path.relative_to(REPOSITORY) for root in roots for path in root.rglob("*.py")) == []


def test_sources_are_short_and_finished() -> None:
    found = [
        defect
        for path in sorted(PACKAGE.rglob("*.py"))
        for defect in defects(path.relative_to(REPOSITORY), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("name", ["utils.py", "data/common.py", "_helpers.py", "text_utils.py", "misc/read.py"])
def test_planted_name_is_found(name: str) -> None:
    assert nameless(iter([Path("src/loratune", name)]))


@pytest.mark.parametrize("name", ["commonmark.py", "utilisation.py", "miscount.py", "lora/layer.py"])
def test_real_name_passes(name: str) -> None:
    assert not nameless(iter([Path("src/loratune", name)]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\n" * 401, "401 lines"),
        ("class C:\n    def f(self):\n" + "        x = 1\n" * 60, "f has 61 lines"),
        ("async def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("x = 1  # TODO: later\n", "says TODO"),
        ("def f():\n    raise NotImplementedError\n", "says raise NotImplementedError"),
    ],
)
def test_planted_defect_is_found(text: str, reason: str) -> None:
    (defect,) = defects(Path("x.py"), text)
    assert reason in defect


def test_catching_what_others_left_undone_passes() -> None:
    assert defects(Path("x.py"), "try:\n    f()\nexcept NotImplementedError:\n    pass\n") == []


def test_longest_allowed_passes() -> None:
    text = "def f():\n" + "    x = 1\n" * 59 + "y = 2\n" * 340
    assert defects(Path("x.py"), text) == []
