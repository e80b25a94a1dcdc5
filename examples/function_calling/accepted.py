"""What counts as the right call: a function name and, for each argument, every value that is accepted.

One `Accepted` is one row of `heldout_answers.jsonl`, the file that `prepare.py` writes and `score.py` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# In a list of accepted values the empty string stands for "may be left out".
LEFT_OUT = ""


@dataclass(frozen=True)
class Argument:
    """An argument of the expected call: its declared type, and the values that are right."""

    type: str  # string, integer, float, boolean, array, tuple, dict or any
    items: str | None  # the declared type of an array's items
    required: bool
    values: tuple[Any, ...]

    @property
    def optional(self) -> bool:
        """Whether a call without this argument is right."""
        return not self.required and LEFT_OUT in self.values


@dataclass(frozen=True)
class Accepted:
    """The one function that answers a question, with its accepted arguments."""

    name: str
    arguments: Mapping[str, Argument]

    def to_row(self) -> dict[str, Any]:
        """The JSON form."""
        arguments = {
            key: {
                "type": argument.type,
                **({"items": argument.items} if argument.items else {}),
                "required": argument.required,
                "values": list(argument.values),
            }
            for key, argument in self.arguments.items()
        }
        return {"name": self.name, "arguments": arguments}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Accepted:
        """Read the JSON form back."""
        arguments = {
            key: Argument(stored["type"], stored.get("items"), stored["required"], tuple(stored["values"]))
            for key, stored in row["arguments"].items()
        }
        return cls(row["name"], arguments)
