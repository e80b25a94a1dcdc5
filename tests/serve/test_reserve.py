"""What is kept of the memory for adapters is what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratune as lt
from loratune.adapter import count_parameters
from loratune.errors import AdapterFileError
from loratune.serve.reserve import adapters_bytes
from tests.models import tiny
from tests.serve.conftest import Shelf, service


def test_parameters_are_counted_in_the_header(shelf: Shelf, tmp_path: Path) -> None:
    tensors = load_file(shelf.adapters / "c" / "adapter_model.safetensors")
    assert count_parameters(shelf.adapters / "c") == sum(t.numel() for t in tensors.values())
    with pytest.raises(AdapterFileError, match="damaged or not"):
        count_parameters(tmp_path)


def test_the_largest_counts_for_each(shelf: Shelf, tmp_path: Path) -> None:
    model = tiny("llama")
    paths = [str(shelf.adapters / name) for name in "ac"]
    assert adapters_bytes(model, torch.float32, paths, 3) == 3 * 24 * count_parameters(shelf.adapters / "c")
    assert adapters_bytes(model, torch.bfloat16, [*paths, str(tmp_path)], 1) == 14 * count_parameters(
        shelf.adapters / "c"
    )


def test_without_one_rank_16_is_taken() -> None:
    model = tiny("llama")
    expected = lt.plan(model, lt.LoraConfig(r=16, target_modules="all-linear")).trainable
    head = 16 * sum(model.lm_head.weight.shape)
    assert adapters_bytes(model, torch.float32, [], 2) == 2 * 24 * (expected + head)


@pytest.mark.parametrize(
    ("config", "names", "count"),
    [
        ({}, (), 0),
        ({}, ("a", "b"), 2),
        ({"adapters": 1}, ("a", "b"), 1),
        ({"adapter_dir": "."}, ("a",), 16),
        ({"adapter_dir": ".", "adapters": 3}, (), 3),
    ],
)
def test_for_as_many_as_may_be_loaded(
    config: dict[str, Any], names: tuple[str, ...], count: int, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def reserved(*args: Any) -> int:
        seen.append(args[-1])
        return adapters_bytes(*args)

    monkeypatch.setattr("loratune.serve.server.adapters_bytes", reserved)
    found = service(shelf, *names, **config)
    assert seen == [count]
    each = adapters_bytes(found.worker.engine.model, torch.float32, [str(shelf.adapters / name) for name in names], 1)
    assert found.worker.engine.limits.reserved == count * each
