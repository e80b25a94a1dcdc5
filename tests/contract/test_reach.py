"""How far the tests reach is on the page, is what was asked for, and its figures are counted right."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests import reach

PAGE = reach.PAGE.read_text(encoding="utf-8")
DAY = dt.date(2026, 11, 26)


def test_nine_branches_of_ten_run() -> None:
    (share,) = re.findall(
        r"^Measured on [\d-]+: ([\d.]+) % of [\d,]+ statements and [\d,]+ branches", PAGE, re.MULTILINE
    )
    assert float(share) >= 90


def test_most_changes_are_noticed() -> None:
    (share,) = re.findall(
        r"^Planted on [\d-]+: [\d,]+ changes(?: of [\d,]+, drawn at random)?, ([\d.]+) % noticed", PAGE, re.MULTILINE
    )
    assert float(share) >= 85


def test_coverage_by_room() -> None:
    def file(lines: int, ran: int, branches: int, taken: int) -> dict[str, dict[str, int]]:
        names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
        return {"summary": dict(zip(names, (lines, ran, branches, taken), strict=True))}

    files = {"src/loratune/loss.py": file(10, 10, 0, 0), "src/loratune/lora/a.py": file(6, 3, 2, 1)}
    files["src/loratune/lora/b.py"] = file(2, 2, 0, 0)
    total = {"num_statements": 18, "covered_lines": 15, "num_branches": 2, "covered_branches": 1}
    text = reach.coverage_text({"files": files, "totals": total}, DAY)
    assert text == ("Measured on 2026-11-26: 80.0 % of 18 statements and 2 branches. Least: `lora` 60 %, `loss` 100 %.")


@pytest.fixture
def tried(tmp_path: Path) -> Path:
    folder = tmp_path / "src" / "loratune" / "lora"
    folder.mkdir(parents=True)
    codes = {"x_drop__mutmut_1": 1, "x__mix__mutmut_2": 0, "xǁLowRankǁr__mutmut_1": 33, "x_drop__mutmut_9": 36}
    content = {"exit_code_by_key": {f"loratune.lora.dropout.{name}": code for name, code in codes.items()}}
    (folder / "dropout.py.meta").write_text(json.dumps(content))
    return tmp_path


def test_mutants_by_file(tried: Path) -> None:
    outcomes = reach.outcomes_in(tried)
    assert outcomes == {"lora/dropout.py": Counter(killed=1, survived=1, unreached=1, late=1)}
    text = reach.mutants_text(outcomes, {"tried": 100, "noticed": 2}, DAY)
    assert text.startswith("Planted on 2026-11-26: 4 changes, 50.0 % noticed. Of 100 runs without a change 2 were ")
    assert "\n| lora/dropout.py | 4 | 50 % | 1 | 2 |\n| all | 4 | 50 % | 1 | 2 |" in text


def test_survivors_are_explained(tried: Path) -> None:
    assert reach.unexplained(reach.survivors_in(tried), "of `drop` and `_mix`") == ["LowRank.r"]
    assert reach.unexplained(reach.survivors_in(tried), "`LowRank.r`, `_mix`") == []


def test_some_were_not_tried(tried: Path) -> None:
    path = tried / "src" / "loratune" / "lora" / "dropout.py.meta"
    codes = json.loads(path.read_text())["exit_code_by_key"]
    path.write_text(json.dumps({"exit_code_by_key": {**codes, "loratune.lora.dropout.x_drop__mutmut_5": None}}))
    text = reach.mutants_text(reach.outcomes_in(tried), {"tried": 0, "noticed": 0}, DAY)
    assert text.startswith("Planted on 2026-11-26: 4 changes of 5, drawn at random, 50.0 % noticed.")
    path.write_text(json.dumps({"exit_code_by_key": {"loratune.lora.dropout.x_drop__mutmut_1": 77}}))
    with pytest.raises(SystemExit, match="ended with 77"):
        reach.outcomes_in(tried)
