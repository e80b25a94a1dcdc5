"""The examples of tasks other than writing: a real encoder on real rows beats its base on rows held out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tasks"


def metrics_of(script: str, out: Path, *options: str) -> dict[str, Any]:
    """Run a script as its page says, and read what it left."""
    told = subprocess.run(
        [sys.executable, str(FOLDER / script), "--out", str(out), *options], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr[-2000:]
    record = json.loads((out / "record.json").read_text())
    assert all(check["passed"] for check in record["checks"])
    found: dict[str, Any] = record["result"]["metrics"]
    assert all(name in told.stdout for name in found["tuned"])
    return found


def test_classify(tmp_path: Path) -> None:
    found = metrics_of("classify.py", tmp_path / "run", "--rows", "320", "--steps", "24", "--checks", "fast")
    assert found["tuned"]["accuracy"] > found["tuned"]["majority"] + 0.15
    assert found["tuned"]["accuracy"] > found["base"]["accuracy"] + 0.15
    assert found["tuned"]["macro_f1"] > found["base"]["macro_f1"] + 0.15


@pytest.mark.full
def test_tag(tmp_path: Path) -> None:
    found = metrics_of("tag.py", tmp_path / "run", "--rows", "320", "--steps", "24", "--checks", "fast")
    assert found["tuned"]["span_f1"] > found["base"]["span_f1"] + 0.2
    assert found["tuned"]["accuracy"] > found["tuned"]["majority"] + 0.03


@pytest.mark.full
@pytest.mark.timeout(900)  # a minute of a core, which may have much else to do
def test_find(tmp_path: Path) -> None:
    found = metrics_of("find.py", tmp_path / "run", "--rows", "700", "--steps", "50", "--checks", "fast")
    assert found["tuned"]["f1"] > max(found["base"]["f1"], found["tuned"]["trivial_f1"]) + 0.15
    assert found["tuned"]["exact_match"] > found["base"]["exact_match"] + 0.15


@pytest.mark.full
def test_retrieve(tmp_path: Path) -> None:
    found = metrics_of("retrieve.py", tmp_path / "run", "--steps", "20", "--checks", "fast")
    assert found["tuned"]["recall_at_1"] > found["base"]["recall_at_1"] + 0.02
    assert found["tuned"]["mrr"] > found["base"]["mrr"] + 0.01


@pytest.mark.full
def test_write(tmp_path: Path) -> None:
    found = metrics_of("write.py", tmp_path / "run", "--rows", "320", "--steps", "40", "--checks", "fast")
    assert found["base"]["exact_match"] == 0.0
    assert found["tuned"]["exact_match"] > 0.6, "more than the half that always writing one word gives"
