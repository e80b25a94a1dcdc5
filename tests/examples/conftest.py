"""The examples are scripts, not a package: their modules are found beside each other, as when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "function_calling"

sys.path.insert(0, str(FOLDER))
