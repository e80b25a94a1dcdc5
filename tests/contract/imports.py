"""Reads who imports whom in a package and holds it against the table of rooms.

The table is a list of lines. A module imports rooms on lines above its own, or modules of its own room without a cycle;
rooms that share a line do not meet. Every import counts: inside functions, under TYPE_CHECKING, and
`importlib.import_module` or `__import__` of a name. The package's own `__init__` is lazy and may name any room; nothing
imports it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Scope = Literal["module", "function", "typing"]


@dataclass(frozen=True)
class Import:
    """One imported module, as the absolute name that Python resolves."""

    target: str
    line: int
    scope: Scope


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    imports: tuple[Import, ...]
    unreadable: tuple[int, ...]
    """Lines with a dynamic import whose name is not written there."""


@dataclass(frozen=True)
class House:
    """The rules of one package."""

    package: str
    lines: Mapping[str, int]
    """Room to line number: smaller is lower, and may be imported by larger."""
    owners: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Third party to the rooms or modules (`data.render`) that may import it, at all."""
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Room to the third parties it may import, where these are all."""
    never: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Room to third parties that it may not import, not even inside a function."""
    late: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Room to third parties that it may import inside functions only."""

    def room(self, module: str) -> str:
        """`loratune.data.render.chat` → `data`; the package itself → the empty string."""
        return module.removeprefix(self.package).removeprefix(".").partition(".")[0]

    def inside(self, module: str) -> str:
        """`loratune.data.render` → `data.render`."""
        return module.removeprefix(self.package).removeprefix(".")

    def owns(self, module: str) -> bool:
        return module == self.package or module.startswith(self.package + ".")


class _Reader(ast.NodeVisitor):
    def __init__(self, name: str, is_package: bool, known: frozenset[str]) -> None:
        self.parents = name.split(".") if is_package else name.split(".")[:-1]
        self.known = known
        self.scope: Scope = "module"
        self.imports: list[Import] = []
        self.unreadable: list[int] = []

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        outer, self.scope = self.scope, "typing" if self.scope == "typing" else "function"
        self.generic_visit(node)
        self.scope = outer

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815  (the name is ast's)
    visit_Lambda = visit_FunctionDef  # noqa: N815

    def visit_If(self, node: ast.If) -> None:
        if not ast.unparse(node.test).endswith("TYPE_CHECKING"):
            self.generic_visit(node)
            return
        outer, self.scope = self.scope, "typing"
        for statement in node.body:
            self.visit(statement)
        self.scope = outer
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self._absolute(node.module or "", node.level)
        for alias in node.names:
            child = f"{base}.{alias.name}"
            self._add(child if child in self.known else base, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        if called.rpartition(".")[2] in ("import_module", "__import__"):
            name = self._dynamic_name(node.args[0]) if node.args else None
            if name is None:
                self.unreadable.append(node.lineno)
            else:
                self._add(name, node.lineno)
        self.generic_visit(node)

    def _absolute(self, module: str, level: int) -> str:
        if level == 0:
            return module
        parents = self.parents[: len(self.parents) - level + 1]
        return ".".join([*parents, module] if module else parents)

    def _dynamic_name(self, node: ast.expr) -> str | None:
        """The name as far as it is written: f"{__name__}.{x}" and f"loratune.cli.{x}" name their package."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            bare = node.value.lstrip(".")
            return self._absolute(bare, len(node.value) - len(bare))
        if not isinstance(node, ast.JoinedStr):
            return None
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
            elif isinstance(part, ast.FormattedValue) and ast.unparse(part.value) in ("__name__", "__package__"):
                text += ".".join(self.parents)
            else:
                break
        written, dot, _ = text.rpartition(".")
        return written if dot else None

    def _add(self, target: str, line: int) -> None:
        self.imports.append(Import(target, line, self.scope))


def module_name(path: Path, root: Path) -> str:
    parts = (root.name, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_package(root: Path) -> dict[str, Module]:
    """Every module under `root`, the folder of the package, by its absolute name."""
    paths = {module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    modules = {}
    for name, path in paths.items():
        reader = _Reader(name, path.name == "__init__.py", frozenset(paths))
        reader.visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        modules[name] = Module(name, path, tuple(reader.imports), tuple(reader.unreadable))
    return modules


def violations(root: Path, house: House) -> list[str]:
    """Every breach of the house's rules, as `module:line reason`; empty when there is none."""
    modules = read_package(root)
    found: list[str] = []
    for module in modules.values():
        found += _misplaced(module, house)
        if module.name == house.package:
            continue
        found += [f"{module.name}:{line} imports a name that is not written there" for line in module.unreadable]
        for item in module.imports:
            reason = _own(module, item, house) if house.owns(item.target) else _third_party(module, item, house)
            if reason:
                found.append(f"{module.name}:{item.line} {reason}")
    found += ["cycle: " + " → ".join(cycle) for cycle in cycles(modules, house)]
    return sorted(found)


def _misplaced(module: Module, house: House) -> Iterator[str]:
    room = house.room(module.name)
    if room and room not in house.lines:
        yield f"{module.name}:1 is in no room of the table"


def _own(module: Module, item: Import, house: House) -> str | None:
    here, there = house.room(module.name), house.room(item.target)
    if not there:
        return f"imports {house.package} itself; name the room that is meant (a version: importlib.metadata)"
    if here == there or here not in house.lines:
        return None
    if there not in house.lines:
        return f"imports {item.target}, which is in no room of the table"
    if house.lines[there] >= house.lines[here]:
        relation = "on the same line as" if house.lines[there] == house.lines[here] else "below"
        return (
            f"imports {item.target}: {there} (line {house.lines[there]}) stands {relation} {here} ({house.lines[here]})"
        )
    return None


def _third_party(module: Module, item: Import, house: House) -> str | None:
    party, room, inside = item.target.partition(".")[0], house.room(module.name), house.inside(module.name)
    if party in sys.stdlib_module_names:
        return None
    owners = house.owners.get(party)
    if owners is not None and not any(inside == owner or inside.startswith(owner + ".") for owner in owners):
        return f"imports {party}, which only {', '.join(sorted(owners)) or 'tests'} may touch"
    if room in house.only and party not in house.only[room]:
        return f"imports {party}; {room} may import only {', '.join(sorted(house.only[room]))}"
    if party in house.never.get(room, frozenset()):
        return f"imports {party}; {room} never does"
    if item.scope == "module" and party in house.late.get(room, frozenset()):
        return f"imports {party} when it is imported itself; {room} may do so inside functions only"
    return None


def cycles(modules: Mapping[str, Module], house: House) -> list[list[str]]:
    """Import cycles, each once, starting at its first name in order; the lazy package `__init__` is no part of any."""
    graph = {
        name: sorted({item.target for item in module.imports if item.target in modules} - {house.package})
        for name, module in modules.items()
        if name != house.package
    }
    found: dict[frozenset[str], list[str]] = {}
    done: set[str] = set()
    for start in sorted(graph):
        if start not in done:
            _walk(start, graph, [], done, found)
    return [found[key] for key in sorted(found, key=sorted)]


def _walk(
    name: str,
    graph: Mapping[str, Iterable[str]],
    trail: list[str],
    done: set[str],
    found: dict[frozenset[str], list[str]],
) -> None:
    trail.append(name)
    for target in graph[name]:
        if target in trail:
            loop = trail[trail.index(target) :]
            first = loop.index(min(loop))
            found.setdefault(frozenset(loop), [*loop[first:], *loop[:first], loop[first]])
        elif target not in done:
            _walk(target, graph, trail, done, found)
    trail.pop()
    done.add(name)
