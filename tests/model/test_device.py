"""What a device is said to have."""

from __future__ import annotations

import pytest
import torch

from loratune.model import available_memory


def test_memory_that_torch_has_freed_and_kept_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2000)
    assert available_memory(torch.device("cuda")) == 4000
