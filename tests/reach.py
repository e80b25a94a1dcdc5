"""How far the tests reach, for `docs/reliability.md`: what they run, and which changed lines they notice.

python -m tests.reach coverage .coverage.json     after `pytest --cov` (make coverage)
python -m tests.reach mutants mutants/            after `mutmut run` (make mutants)
"""

from __future__ import annotations

import datetime as dt
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.counts import between

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
EXPLAINED = PAGE.with_name("mutants.md")
# How a mutant ended, by the exit code that mutmut keeps: pytest's own, or one of mutmut's for a limit of time.
_KILLED, _SURVIVED, _UNREACHED, _TIMED_OUT = (1, 3), (0,), (5, 33), (24, -24, 36, 152, 255)


def coverage_text(report: Mapping[str, Any], day: dt.date) -> str:
    """Branch coverage by room, from coverage.py's JSON."""
    rooms: dict[str, Counter[str]] = {}
    for path, found in report["files"].items():
        room = Path(path).relative_to("src/loratune").parts[0].removesuffix(".py")
        rooms.setdefault(room, Counter()).update(found["summary"])
    total = report["totals"]
    lines = [
        f"Measured on {day}: {_share(total):.1f} % of {total['num_statements']:,} statements and "
        f"{total['num_branches']:,} branches. Least: "
        + ", ".join(f"`{room}` {_share(c):.0f} %" for room, c in sorted(rooms.items(), key=lambda r: _share(r[1]))[:5])
        + ".",
    ]
    return "\n".join(lines)


def _share(summary: Mapping[str, Any]) -> float:
    """Percent of statements and branches that ran, as coverage.py counts them."""
    reached = summary["covered_lines"] + summary["covered_branches"]
    return 100 * float(reached) / float(summary["num_statements"] + summary["num_branches"])


def mutants_text(outcomes: Mapping[str, Counter[str]], control: Mapping[str, int], day: dt.date) -> str:
    """A table by file of those that were tried; one that no test reaches counts as not noticed."""
    total = sum(outcomes.values(), Counter())
    rows = [*sorted(outcomes.items()), ("all", total)]
    table = [
        f"| {name} | {_tried(found)} | {_noticed(found):.0f} % | {found['late']} | {_left(found)} |"
        for name, found in rows
        if _tried(found)
    ]
    drawn = f" of {total.total():,}, drawn at random," if total["untried"] else ""
    head = (
        f"Planted on {day}: {_tried(total):,} changes{drawn or ','} {_noticed(total):.1f} % noticed. "
        f"Of {control['tried']} runs without a change {control['noticed']} were called noticed."
    )
    return "\n".join(
        [head, "", "| file | changes | noticed | of these by time | not noticed |", "|---|---:|---:|---:|---:|", *table]
    )


def _tried(found: Counter[str]) -> int:
    return found.total() - found["untried"]


def _noticed(found: Counter[str]) -> float:
    return 100 * (1 - _left(found) / _tried(found))


def _left(found: Counter[str]) -> int:
    return found["survived"] + found["unreached"]


def outcomes_in(folder: Path) -> dict[str, Counter[str]]:
    """How mutants ended, by the file they are in."""
    found: dict[str, Counter[str]] = {}
    for path in sorted(folder.rglob("*.py.meta")):
        codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        if codes:
            name = path.relative_to(folder / "src" / "loratune").as_posix().removesuffix(".meta")
            found[name] = Counter(_outcome(key, code) for key, code in codes.items())
    return found


def _outcome(mutant: str, code: int | None) -> str:
    if code is None:
        return "untried"
    for name, codes in (("killed", _KILLED), ("survived", _SURVIVED), ("unreached", _UNREACHED), ("late", _TIMED_OUT)):
        if code in codes:
            return name
    raise SystemExit(f"{mutant} ended with {code}, which mutmut does not know")


def survivors_in(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py.meta")):
        codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        yield from (key for key, code in codes.items() if code in (*_SURVIVED, *_UNREACHED))


def unexplained(survivors: Iterator[str], page: str) -> list[str]:
    """Functions with survivors that the page does not name."""
    return sorted(name for name in {function_of(mutant) for mutant in survivors} if f"`{name}`" not in page)


def function_of(mutant: str) -> str:
    """`loratune.lora.layer.x_together__mutmut_4` → `together`; a method's class stands between two of mutmut's bars."""
    name = re.sub(r"__mutmut_\d+$", "", mutant.rpartition(".")[2])
    return name[2:].replace("ǁ", ".") if name.startswith("xǁ") else name.removeprefix("x_")


def main(what: str, path: str) -> None:
    today, page, missing = dt.datetime.now(dt.UTC).date(), PAGE.read_text(encoding="utf-8"), []
    if what == "coverage":
        text = coverage_text(json.loads(Path(path).read_text(encoding="utf-8")), today)
    else:
        control = json.loads(Path(path, "control.json").read_text(encoding="utf-8"))
        text = mutants_text(outcomes_in(Path(path)), control, today)
        missing = unexplained(survivors_in(Path(path)), EXPLAINED.read_text(encoding="utf-8"))
    PAGE.write_text(between(page, what, text), encoding="utf-8")
    print(text)
    if missing:
        raise SystemExit(f"{EXPLAINED.name} does not say why changes were not noticed in: {', '.join(missing)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
