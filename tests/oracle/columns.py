"""What layers other than linear ones multiply their weight's matrix by, position by position, in float64.

An embedding multiplies by a column of zeros with a one at the row's number, a convolution by the patch of its input
under the kernel, flattened. With these columns as rows of x, `lora_reference` says everything else about them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from tests.oracle.lora_reference import Array


def one_hot(ids: Sequence[int], number: int) -> Array:
    """(len(ids), number)."""
    found = np.zeros((len(ids), number))
    for row, i in enumerate(ids):
        found[row, i] = 1.0
    return found


def patches(
    image: Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mode: str,
) -> Array:
    """Of one image (channels, *sizes): (positions, channels · kernel), the positions in the output's order."""
    sizes = image.shape[1:]
    outs = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(sizes, padding, dilation, kernel, stride, strict=True)
    ]
    rows = []
    for place in itertools.product(*map(range, outs)):
        row = []
        for channel in range(len(image)):
            for offset in itertools.product(*map(range, kernel)):
                at = [o * s + k * d - p for o, s, k, d, p in zip(place, stride, offset, dilation, padding, strict=True)]
                row.append(_value(image[channel], at, mode))
        rows.append(row)
    return np.array(rows)


def _value(plane: Array, at: Sequence[int], mode: str) -> float:
    inside = []
    for i, n in zip(at, plane.shape, strict=True):
        if 0 <= i < n:
            inside.append(i)
        elif mode == "zeros":
            return 0.0
        elif mode == "circular":
            inside.append(i % n)
        elif mode == "replicate":
            inside.append(min(max(i, 0), n - 1))
        else:
            assert mode == "reflect"
            inside.append(-i if i < 0 else 2 * (n - 1) - i)
    return float(plane[tuple(inside)])


def whole(weight: Array, groups: int) -> Array:
    """A convolution's weight (out, in / groups, *kernel) as the matrix (out, in · kernel) over all inputs."""
    out, channels = weight.shape[:2]
    flat = weight.reshape(out, -1)
    found = np.zeros((out, flat.shape[1] * groups))
    for row in range(out):
        group = row // (out // groups)
        found[row, group * flat.shape[1] : (group + 1) * flat.shape[1]] = flat[row]
    assert found.shape[1] == channels * groups * int(np.prod(weight.shape[2:]))
    return found


def blocks(B: Array, groups: int) -> Array:
    """B (out, r / groups, 1, ...) as the matrix (out, r): each group of rows sees its own part of A x."""
    return whole(B, groups)
