"""What is stored of a quantised matrix, and the matrix again: bit for bit against a reference that shares no code."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.errors import MissingExtraError
from loratune.quant import FORMATS
from loratune.quant.formats import Format, dynamic_map
from tests.oracle import nf4_reference as oracle

NF4, INT8 = FORMATS["nf4"], FORMATS["int8"]
# In_features that are no multiple of the block of 64 are those that bitsandbytes' decoder on the CPU gets wrong.
SHAPES = [(8, 64), (3, 96), (5, 80), (7, 32), (4, 576), (16, 1536), (1, 1), (3, 7), (33, 100), (130, 192)]


def matrix(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_decoded_as_the_paper_says(shape: tuple[int, int]) -> None:
    stored = NF4.encode(matrix(shape))
    numbers = {name: tensor.numpy() for name, tensor in stored.items()}
    # In fp32 the last bit of the map depends on how its steps are counted: it is part of the format.
    code = dynamic_map(torch.device("cpu")).numpy()
    assert np.allclose(code, oracle.dynamic_map(), rtol=2e-7, atol=0)
    scales = oracle.scales(numbers["scales"], numbers["outer_scales"], numbers["offset"][()], code)
    fine = oracle.decode(numbers["packed"], scales)[: shape[0] * shape[1]].reshape(shape)
    assert np.array_equal(NF4.decode(stored, shape, torch.float32).numpy(), fine)
    assert np.array_equal(NF4.decode(stored, shape, torch.bfloat16).float().numpy(), oracle.bf16(fine))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_takes_the_nearest_level(shape: tuple[int, int]) -> None:
    """Each weight over the largest of its block, which double quantisation changes by little."""
    weight = matrix(shape, dtype=torch.float32)
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).reshape(-1, 64)
    largest = flat.abs().amax(1, keepdim=True)
    relative = (flat / torch.where(largest > 0, largest, 1.0)).numpy()
    packed = NF4.encode(weight)["packed"].numpy()
    halves = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1, 64)
    away = np.abs(relative[..., None] - oracle.LEVELS)
    taken = np.take_along_axis(away, halves[..., None].astype(np.int64), -1)[..., 0]
    assert np.all(taken <= away.min(-1) + 1e-6)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_int8_is_within_half_a_step(rows: int, columns: int, seed: int) -> None:
    weight = matrix((rows, columns), seed, torch.float32)
    back = INT8.decode(INT8.encode(weight), (rows, columns), torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127 * (1 + 2**-8)  # which is a number of bf16
    assert bool(((back - weight).abs() <= 0.5001 * step).all())


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 48), rows=st.integers(1, 40), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_int8_codes_are_multiplied_as_they_are(tokens: int, rows: int, columns: int, seed: int) -> None:
    """Rounded once: what the matrix gives that the codes stand for, within the last bit of bf16."""
    columns *= 32
    stored = INT8.encode(matrix((rows, columns), seed))
    x = matrix((tokens, columns), seed + 1).view(1, tokens, columns)
    found = INT8.times(stored, x)
    assert found is not None
    assert found.shape == (1, tokens, rows)
    exact = x.double() @ INT8.decode(stored, (rows, columns), torch.float32).double().T
    sums = x.double().abs() @ INT8.decode(stored, (rows, columns), torch.float32).double().abs().T
    assert bool(((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * sums).all())


def test_what_is_decoded_instead() -> None:
    stored = INT8.encode(matrix((8, 64)))
    assert INT8.times(stored, matrix((49, 64))) is None
    assert INT8.times(stored, matrix((0, 64))) is None
    assert INT8.times(stored, matrix((1, 64)).float()) is None
    assert INT8.times(INT8.encode(matrix((8, 80))), matrix((1, 80))) is None
    assert NF4.times(NF4.encode(matrix((8, 64))), matrix((1, 64))) is None


def test_any_layout_of_x() -> None:
    stored, x = INT8.encode(matrix((8, 64))), matrix((64, 3))
    a, b = INT8.times(stored, x.T), INT8.times(stored, x.T.contiguous())
    assert a is not None
    assert b is not None
    assert torch.equal(a, b)


def test_rows_of_zeros() -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 1
    for found in FORMATS.values():
        back = found.decode(found.encode(weight), (3, 64), torch.float32)
        assert torch.allclose(back, weight, atol=0.05), found.name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(FORMATS))
def test_bytes_are_what_is_said(name: str, shape: tuple[int, int]) -> None:
    stored = FORMATS[name].encode(matrix(shape))
    held = {part: tensor.numel() * tensor.itemsize for part, tensor in stored.items()}
    assert FORMATS[name].bytes_of(shape) == (held["packed"], sum(held.values()) - held["packed"])


def test_nf4_takes_four_bits_and_an_eighth() -> None:
    """0.5 + 1/64 + 4/(64 · 256) bytes a weight: 4.127 bits, the paper's figure."""
    assert 8 * sum(NF4.bytes_of((4096, 4096))) / 4096**2 == pytest.approx(4.127, abs=1e-3)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(MissingExtraError, match="needs the package bitsandbytes") as error:
        NF4.encode(matrix((8, 64)))
    assert "loratune[quant]" in error.value.hint
    INT8.encode(matrix((8, 64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (257, 128), (64, 4096)], ids=str)
@pytest.mark.parametrize("held", [NF4, INT8], ids=["nf4", "int8"])
def test_a_piece_at_a_time_is_the_same(
    held: Format, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = held.encode(matrix(shape))
    whole = held.decode(stored, shape, dtype)
    for at_once in (64 * 256, 1 << 19):
        monkeypatch.setattr("loratune.quant.formats._AT_ONCE", at_once)
        room = torch.full((held.size_of(shape) + 7,), torch.nan, dtype=dtype)
        assert torch.equal(held.decode(stored, shape, dtype, room), whole)
        assert room[held.size_of(shape) :].isnan().all()
