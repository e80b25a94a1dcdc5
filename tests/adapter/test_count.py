"""How many numbers a file holds, by its header alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratune.adapter import count_parameters
from loratune.errors import AdapterFileError


def test_numbers_of_all_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5), "c": torch.zeros(())}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert count_parameters(tmp_path) == 6 + 5 + 1


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"])
def test_a_file_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors is damaged or not a safetensors file"):
        count_parameters(tmp_path)
