"""The names of a model's adapters, and what is known about each."""

from __future__ import annotations

from torch import nn

from loratune.adapt.entry import Entry
from loratune.errors import AdapterStateError, nearest


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

    def free(self, name: str) -> None:
        """Raise unless a new adapter can have this name."""
        if name in self.entries:
            raise AdapterStateError(f"an adapter {name!r} is there already", hint="choose another name or remove it")
        # It becomes the name of a child module, and a part of the names in `state_dict`.
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise AdapterStateError(f"{name!r} cannot name an adapter", hint="use letters, digits, '-' and '_'")

    def put(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry

    def remove(self, name: str) -> None:
        del self.entries[name]

    def rename(self, old: str, new: str) -> None:
        self.entries = {new if name == old else name: entry for name, entry in self.entries.items()}

    def shared_tensors(self, names: tuple[str, ...]) -> list[str]:
        """Sentences about base tensors of which several of these adapters have their own."""
        owner: dict[str, str] = {}
        tensors = [
            (name, full) for name in names for part in self.entries[name].plan.replaced for full in part.full_names()
        ]
        return [
            f"{owner[full]!r} and {name!r} both have their own {full}"
            for name, full in tensors
            if owner.setdefault(full, name) != name
        ]
