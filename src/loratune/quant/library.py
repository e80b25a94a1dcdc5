"""bitsandbytes, imported where it is needed and without what it says on the way."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from loratune.errors import MissingExtraError


def bitsandbytes(part: str, wanted: str) -> Any:
    """The module `bitsandbytes.part`.

    Args:
        wanted: what it is needed for, as the error names it.

    Raises:
        MissingExtraError: it is not installed.
    """
    log = logging.getLogger("bitsandbytes")
    before = log.level
    log.setLevel(logging.ERROR)  # on import it warns of a kernel that nothing here calls
    try:
        return importlib.import_module(f"bitsandbytes.{part}")
    except ImportError as error:
        raise MissingExtraError(f"{wanted} needs the package bitsandbytes", extra="quant") from error
    finally:
        log.setLevel(before)
