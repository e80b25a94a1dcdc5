"""NF4 with double quantisation, decoded by hand (Dettmers et al., arXiv:2305.14314, section 3 and appendix E)."""

from __future__ import annotations

import numpy as np

# The 16 values of appendix E, as fp32.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)


def dynamic_map() -> np.ndarray:
    """The eight-bit values with a dynamic exponent that statistics are kept in (Dettmers et al., arXiv:2110.02861,
    section 1.3): one bit for the sign, one for each power of ten, the rest evenly spaced means within it."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = np.linspace(0.1, 1.0, 2**power + 1)
        means = 10.0 ** (power - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means, *-means]
    return np.sort(np.array(values))


def scales(codes: np.ndarray, outer: np.ndarray, offset: np.float32, code: np.ndarray) -> np.ndarray:
    """fp32 scale of each block of 64 from its code, the scale of its 256 neighbours, and the mean taken off before."""
    found = [
        np.float32(np.float32(code[c]) * np.float32(outer[i // 256])) + np.float32(offset) for i, c in enumerate(codes)
    ]
    return np.array(found, dtype=np.float32)


def decode(packed: np.ndarray, block_scales: np.ndarray) -> np.ndarray:
    """fp32 values, two of each byte, the high half first."""
    halves = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    return (LEVELS[halves].reshape(-1, 64) * block_scales[:, None].astype(np.float32)).reshape(-1)


def bf16(values: np.ndarray) -> np.ndarray:
    """fp32 values rounded to the nearest bf16, ties to even, as fp32."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)
