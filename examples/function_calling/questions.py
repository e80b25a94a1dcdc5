"""Finds the questions that `bfcl-eval` ships and reads them, without importing the package.

`bfcl-eval` pins dozens of inference clients, so it is installed without them (`pip install --no-deps bfcl-eval`)
and its modules cannot be imported; the data files are all this example needs.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accepted import Accepted, Argument

# The single-turn sets in which exactly one call of one Python-style function is right.
SETS = ("simple_python", "multiple", "live_simple")


@dataclass(frozen=True)
class Question:
    """A question, the functions offered for it (as JSON descriptions) and the call that answers it."""

    id: str
    text: str
    functions: tuple[Mapping[str, Any], ...]
    accepted: Accepted


def data_folder() -> Path:
    """The data folder inside the installed `bfcl-eval`; `SystemExit` with the way to install it otherwise."""
    spec = importlib.util.find_spec("bfcl_eval")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "data"
        if (folder / "possible_answer").is_dir():
            return folder
    raise SystemExit("the questions come with the package bfcl-eval: pip install --no-deps bfcl-eval")


def read_questions(folder: Path | None = None) -> list[Question]:
    """The questions of `SETS` that have a right answer, in file order.

    In a few rows of the data set no call can be right: a required argument has no accepted value, or is not among the
    accepted arguments at all.
    """
    folder = folder or data_folder()
    questions = []
    for name in SETS:
        file_name = f"BFCL_v4_{name}.json"
        answers = {row["id"]: row["ground_truth"] for row in _read_lines(folder / "possible_answer" / file_name)}
        for row in _read_lines(folder / file_name):
            question = _question(row, answers[row["id"]])
            if question is not None:
                questions.append(question)
    return questions


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _question(row: Mapping[str, Any], ground_truth: list[dict[str, dict[str, list[Any]]]]) -> Question | None:
    (turn,) = row["question"]
    ((name, values),) = ground_truth[0].items()
    (parameters,) = [function["parameters"] for function in row["function"] if function["name"] == name]
    if any(not values.get(key) for key in parameters["required"]):
        return None
    # In the order of the signature: an order that has to be guessed could not be learnt.
    arguments = {
        key: Argument(
            type=schema["type"],
            items=schema.get("items", {}).get("type"),
            required=key in parameters["required"],
            values=tuple(values[key]),
        )
        for key, schema in parameters["properties"].items()
        if key in values
    }
    return Question(
        id=row["id"],
        # A few questions bring a system message of their own; it is part of what is asked.
        text="\n".join(message["content"].strip() for message in turn),
        functions=tuple(row["function"]),
        accepted=Accepted(name, arguments),
    )
