"""Scripts of the repository that are no part of the package, loaded by their path."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.contract.house import REPOSITORY


def script(path: str) -> ModuleType:
    """The module at `path`, from the repository's root."""
    file = REPOSITORY / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
