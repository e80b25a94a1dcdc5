"""Reads what a page promises: Python blocks, `loratune` command lines, make targets, options named in the text."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SHELL = {"sh", "bash", "console", "shell", "text", ""}


@dataclass(frozen=True)
class Command:
    """`loratune train m.gguf d.jsonl --rank 8` → name `train`, options `--rank`."""

    name: str
    options: tuple[str, ...]


def python_blocks(page: str) -> list[str]:
    return [body for language, body in FENCE.findall(page) if language in ("python", "py")]


def shell_lines(page: str) -> Iterator[str]:
    """The lines of shell blocks, continued ones joined, without prompt; and the code in the running text."""
    for language, body in FENCE.findall(page):
        if language in SHELL:
            for line in body.replace("\\\n", " ").splitlines():
                yield line.strip().removeprefix("$ ")
    yield from CODE.findall(FENCE.sub("", page))


def commands(page: str) -> list[Command]:
    found = []
    for line in shell_lines(page):
        for part in re.split(r"\s*(?:&&|\|\||[|;])\s*", line):
            words = _words(part)
            while words and re.fullmatch(r"\w+=.*", words[0]):  # VARIABLE=value before the command
                words = words[1:]
            if words and words[0].rpartition("/")[2] == "loratune":
                found.append(_command(words[1:]))
    return found


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in prose
        return line.split()


def _command(words: list[str]) -> Command:
    options = [option for word in words if word.startswith("--") for option in word.split("=")[0].split("/")]
    name = words[0] if words and re.fullmatch(r"[a-z][a-z-]*", words[0]) else ""
    return Command(name, tuple(option for option in options if re.fullmatch(r"--[a-z][a-z0-9-]*", option)))


def loose_options(page: str) -> list[str]:
    """Options that the running text names by themselves, such as `--rank` or `--rank 8`."""
    spans = CODE.findall(FENCE.sub("", page))
    return [option for span in spans if span.startswith("--") for option in re.findall(r"--[a-z][a-z0-9-]*", span)]


def make_targets(page: str) -> list[str]:
    return [words[1] for line in shell_lines(page) if (words := line.split())[:1] == ["make"] and len(words) > 1]


def loratune_names(source: str) -> list[str]:
    """Dotted names that a block takes from loratune: `lt.attach` → `loratune.attach` (not methods of objects)."""
    tree, bound, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "loratune":
                    bound[alias.asname or "loratune"] = alias.name if alias.asname else "loratune"
                    found.append(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "loratune":
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    bound.setdefault("lt", "loratune")
    bound.setdefault("loratune", "loratune")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in bound and re.fullmatch(r"[\w.]+", rest):
                found.append(f"{bound[root]}.{rest}")
    return sorted(set(found))
