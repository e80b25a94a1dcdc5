"""docs/settings.md is what the settings say."""

from __future__ import annotations

import importlib.util

from loratune.config import TrainConfig, flag_of
from tests.contract.house import REPOSITORY


def test_settings_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_settings", REPOSITORY / "docs" / "make_settings.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    written = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == maker.page(), "run: python docs/make_settings.py"
    for name, field in TrainConfig.model_fields.items():
        assert f"`{flag_of(name, field)}`" in written, name
