"""Where what was made once for all runs of a user is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """LORATUNE_CACHE, or `loratune` in the user's cache; it need not be there."""
    root = os.environ.get("LORATUNE_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "loratune"
