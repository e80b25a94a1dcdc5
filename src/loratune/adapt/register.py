"""The names of a model's adapters, and what is known about each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from loratune.adapt.entry import Entry
from loratune.config.methods import IA3, LORA
from loratune.errors import AdapterStateError, nearest

# Of a module, a part of the names in `state_dict`, and of a folder.
_NAME = re.compile(r"[^./\\\x00]+")

# What two kinds of adapter do to a whole weight, so that it has to be the base's.
_WHAT = {LORA: "DoRA, which brings the base's rows to a length", IA3: "(IA)³, which rescales what the base gives"}


class Register:
    """Adapters by name, in the order in which they came."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def known(self, name: str) -> str:
        """`name`, if there is such an adapter."""
        if name not in self.entries:
            raise AdapterStateError(
                f"no adapter {name!r}{nearest(str(name), self.names)}", hint=f"adapters here: {', '.join(self.names)}"
            )
        return name

    def of(self, names: Iterable[str]) -> dict[str, Entry]:
        return {name: self.entries[name] for name in names}

    def all_known(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names without repeats, if there is such an adapter for each."""
        given: tuple[object, ...] = tuple(names)
        if not all(isinstance(name, str) for name in given):
            raise AdapterStateError(
                "an adapter's name is a string", hint=f'one argument each: "{next(iter(self.names), "name")}", …'
            )
        wanted = tuple(dict.fromkeys(names))
        unknown = [
            f"no adapter {name!r}{nearest(str(name), self.names)}" for name in wanted if name not in self.entries
        ]
        if unknown:
            raise AdapterStateError(unknown, hint=f"adapters here: {', '.join(self.names)}")
        return wanted

    def together(self, names: Iterable[str]) -> tuple[str, ...]:
        """The same, if these can be active at once."""
        wanted = self.all_known(names)
        problems = self._clashes(wanted) if len(wanted) > 1 else []
        if problems:
            raise AdapterStateError(problems, hint="activate one of them at a time")
        return wanted

    def free_ordinal(self) -> int:
        """The smallest number from 1 that no adapter's start has."""
        used = {entry.ordinal for entry in self.entries.values()}
        return next(number for number in range(1, len(used) + 2) if number not in used)

    def one(self, name: str | None, active: tuple[str, ...]) -> str:
        """`name`, or without one the only adapter there is, or the only active one."""
        if name is not None:
            return self.known(name)
        for candidates in (self.names, active):
            if len(candidates) == 1:
                return candidates[0]
        if not self.names:
            raise AdapterStateError("this model has no adapter left", hint="add or load one")
        raise AdapterStateError("which adapter? there are several", hint=f"name one of {', '.join(self.names)}")

    def free(self, name: object) -> None:
        """Raise unless a new adapter can have this name."""
        if name in self.entries:
            raise AdapterStateError(f"an adapter {name!r} is there already", hint="choose another name or remove it")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
            raise AdapterStateError(f"{name!r} cannot name an adapter", hint="use letters, digits, '-' and '_'")

    def put(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry

    def remove(self, name: str) -> None:
        del self.entries[name]

    def rename(self, old: str, new: str) -> None:
        self.entries = {new if name == old else name: entry for name, entry in self.entries.items()}

    def _clashes(self, names: tuple[str, ...]) -> list[str]:
        """Sentences about base tensors for which these adapters together say nothing definite."""
        owner: dict[str, str] = {}
        tensors = [
            (name, full) for name in names for part in self.entries[name].plan.whole for full in part.full_names()
        ]
        both = [
            f"{owner[full]!r} and {name!r} both have their own {full}"
            for name, full in tensors
            if owner.setdefault(full, name) != name
        ]
        stretched = [
            f"{name!r} is {_WHAT[self.entries[name].config.peft_type]}, and {owner[full]!r} has its own {full}"
            for name in names
            if self.entries[name].config.use_dora or self.entries[name].config.peft_type == IA3
            for target in self.entries[name].plan.targets
            for full in (f"{target.path}.weight", f"{target.path}.bias")
            if full in owner and (full.endswith("weight") or target.method == IA3)
        ]
        return both + stretched + self._row_clashes(names)

    def _row_clashes(self, names: tuple[str, ...]) -> list[str]:
        """Of tables of which an adapter has rows: nothing else of them may be another's, but other rows."""
        changing = {
            (name, path): what
            for name in names
            for what, paths in (
                ("adapts it", (target.path for target in self.entries[name].plan.targets)),
                ("has its own", (part.path for part in self.entries[name].plan.whole if "weight" in part.numbers)),
            )
            for path in paths
        }
        found, owner = [], dict[tuple[str, int], str]()
        for name in names:
            for part in self.entries[name].plan.token_rows:
                found += [
                    f"{name!r} has rows of its own of {path}, and {other!r} {what}"
                    for (other, path), what in changing.items()
                    if other != name and path in part.paths
                ]
                twice = [t for t in part.tokens if owner.setdefault((part.path, t), name) != name]
                if twice:
                    other = owner[part.path, twice[0]]
                    found.append(f"{other!r} and {name!r} both have their own row {twice[0]} of {part.path}")
        return found


def listed(names: Sequence[str]) -> str:
    return f"adapter {names[0]!r} is" if len(names) == 1 else f"adapters {', '.join(map(repr, names))} are"
