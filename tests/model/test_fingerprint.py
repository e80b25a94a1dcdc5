"""Whether any bit of the weights has changed, on the CPU and in the way of a device."""

from __future__ import annotations

import pytest
import torch

from loratune.model import exact_hash
from loratune.model.fingerprint import _weighted_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_device", [False, True])
def test_every_bit_and_every_place_counts(on_device: bool, dtype: torch.dtype) -> None:
    def known(tensor: torch.Tensor) -> str:
        # What a device would send to the CPU is made there here.
        return exact_hash([("w", _weighted_sums(tensor.reshape(-1)) if on_device else tensor)])

    tensor = (torch.rand(700, 400, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    before = known(tensor)
    assert known(tensor.clone()) == before
    bits = tensor.view(torch.uint8)
    for place in (0, 3, bits.numel() // 2, bits.numel() - 1):
        bits.view(-1)[place] ^= 1
        assert known(tensor) != before, place
        bits.view(-1)[place] ^= 1
    assert known(tensor) == before
    assert known(tensor.flip(0)) != before
    tensor[[4, 5]] = tensor[[5, 4]]
    assert known(tensor) != before


def test_names_and_shapes_count() -> None:
    tensor = torch.arange(6.0)
    assert exact_hash([("a", tensor)]) != exact_hash([("b", tensor)])
    assert exact_hash([("a", tensor)]) != exact_hash([("a", tensor.view(2, 3))])
    assert exact_hash([("a", tensor)]) != exact_hash([("a", tensor.view(torch.int32))])
