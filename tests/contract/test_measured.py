"""The README's figures are those of the committed results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_readme_table_is_made_from_the_committed_result() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = tables.demo_table(json.loads(tables.DEMO.read_text(encoding="utf-8")))
    assert tables.with_table(readme, table) == readme, "run: python benchmarks/tables.py --write"
    assert "| exact call |" in readme
