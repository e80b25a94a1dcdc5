"""docs/settings.md is what the settings say."""

from __future__ import annotations

from loratune.config import TrainConfig, flag_of
from tests.contract.house import REPOSITORY
from tests.contract.scripts import script


def test_settings_page_is_current() -> None:
    maker = script("docs/make_settings.py")
    written = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == maker.page(), "run: python docs/make_settings.py"
    for name, field in TrainConfig.model_fields.items():
        assert f"`{flag_of(name, field)}`" in written, name
