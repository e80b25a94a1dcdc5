"""Scores generated calls against the accepted ones.

    python score.py generations.jsonl data/heldout_answers.jsonl

Three fractions of all rows: the output is a valid call (the whole output is one JSON object with `name` and
`arguments`), it names the right function, and it is exact (right function, every argument present that has to be, no
unknown one, every value accepted). Values are compared as leniently as the AST checker of the leaderboard compares
them, and no more; see `compare.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from accepted import Accepted
from compare import is_accepted


@dataclass(frozen=True)
class Verdict:
    """What holds for one output, and why it is not exact (None when it is)."""

    valid: bool
    name: bool
    exact: bool
    reason: str | None


@dataclass(frozen=True)
class Score:
    """Fractions of the scored rows, each in [0, 1]."""

    rows: int
    valid: float
    name: float
    exact: float


def score(outputs: Sequence[str], accepted: Sequence[Accepted]) -> Score:
    """Score outputs against the accepted calls of the same position; `ValueError` when there is nothing to score."""
    verdicts = [judge(output, right) for output, right in zip(outputs, accepted, strict=True)]
    if not verdicts:
        raise ValueError("no rows to score")
    rows = len(verdicts)
    return Score(
        rows,
        valid=sum(verdict.valid for verdict in verdicts) / rows,
        name=sum(verdict.name for verdict in verdicts) / rows,
        exact=sum(verdict.exact for verdict in verdicts) / rows,
    )


def judge(output: str, accepted: Accepted) -> Verdict:
    """Judge one output."""
    call = parse_call(output)
    if call is None:
        return Verdict(False, False, False, "not one JSON object with name and arguments")
    name, arguments = call
    if name != accepted.name:
        return Verdict(True, False, False, f"function {name!r} instead of {accepted.name!r}")
    reason = _difference(arguments, accepted)
    return Verdict(True, True, reason is None, reason)


def parse_call(output: str) -> tuple[str, dict[str, Any]] | None:
    """The name and the arguments if the whole output is one call, else None. White space around it is no matter."""
    try:
        call = json.loads(output, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        return None
    name, arguments = call["name"], call["arguments"]
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def read_pairs(generations: Path, answers: Path) -> tuple[list[str], list[Accepted]]:
    """Outputs and accepted calls, paired by `id` where every generation has one, else by position."""
    generated, expected = _read_lines(generations), _read_lines(answers)
    missing = [str(number) for number, row in enumerate(generated, 1) if not isinstance(row.get("output"), str)]
    if missing:
        raise SystemExit(f"{generations}: no text in the column 'output' in rows {', '.join(missing)}")
    if generated and all("id" in row for row in generated):
        by_id = {row["id"]: row for row in generated}
        # Scoring only the rows that happen to be there would flatter a run that was cut short.
        difference = by_id.keys() ^ {row["id"] for row in expected}
        if difference or len(by_id) != len(generated):
            raise SystemExit(f"{generations}: the ids are not those of {answers}, each once: {sorted(difference)[:5]}")
        generated = [by_id[row["id"]] for row in expected]
    elif len(generated) != len(expected):
        raise SystemExit(
            f"{generations} has {len(generated)} rows, {answers} has {len(expected)}, and no ids join them"
        )
    return [row["output"] for row in generated], [Accepted.from_row(row) for row in expected]


def _difference(arguments: Mapping[str, Any], accepted: Accepted) -> str | None:
    for key, argument in accepted.arguments.items():
        if key not in arguments and not argument.optional:
            return f"argument {key!r} is missing"
    for key, value in arguments.items():
        if key not in accepted.arguments:
            return f"argument {key!r} is unknown"
        if not is_accepted(value, accepted.arguments[key]):
            return f"argument {key!r} is {value!r}, not one of {list(accepted.arguments[key].values)!r}"
    return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, print the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("generations", type=Path, help="JSON lines with the model's text in 'output', and perhaps 'id'")
    parser.add_argument("answers", type=Path, help="the heldout_answers.jsonl that prepare.py wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--wrong", action="store_true", help="also list each output that is not exact, with the reason")
    given = parser.parse_args(arguments)
    for path in (given.generations, given.answers):
        if not path.exists():
            parser.error(f"{path} is not there")
    outputs, accepted = read_pairs(given.generations, given.answers)
    if not outputs:
        raise SystemExit(f"{given.answers}: no rows to score")
    result = score(outputs, accepted)
    wrong = [
        {"row": row, "reason": verdict.reason, "output": output}
        for row, (output, right) in enumerate(zip(outputs, accepted, strict=True), 1)
        if not (verdict := judge(output, right)).exact
    ]
    if given.json:
        print(json.dumps({**asdict(result), **({"wrong": wrong} if given.wrong else {})}, ensure_ascii=False))
        return
    print(f"{'rows':>6}{'valid':>9}{'name':>9}{'exact':>9}")
    print(f"{result.rows:>6}{result.valid:>9.1%}{result.name:>9.1%}{result.exact:>9.1%}")
    for entry in wrong if given.wrong else ():
        print(f"row {entry['row']}: {entry['reason']}\n    {entry['output']}")


if __name__ == "__main__":
    main()
