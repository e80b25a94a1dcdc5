"""How A and B start. The adapted model computes the base's function, because B is zero (except with `False`)."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

Init = bool | str


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A generator of its own for one tensor: its numbers depend on the seed and the names, on nothing drawn before."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_factors(
    init: Init, *, r: int, in_features: int, out_features: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A (r, in_features) and B (out_features, r) in fp32 on the CPU.

    `True`: A Kaiming-uniform with a = √5, that is U(-1/√in, 1/√in), as peft draws it; B zero.
    `"gaussian"`: A normal with standard deviation 1/r; B zero.
    `False`: both Kaiming-uniform, so that the adapter changes the output from the start (for tests).
    """
    if init == "gaussian":
        A = _empty(r, in_features).normal_(0.0, 1.0 / r, generator=generator)
    else:
        A = _kaiming(r, in_features, generator)
    B = _kaiming(out_features, r, generator) if init is False else _empty(out_features, r).zero_()
    return A, B


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = 1.0 / math.sqrt(columns)
    return _empty(rows, columns).uniform_(-bound, bound, generator=generator)


def _empty(rows: int, columns: int) -> Tensor:
    # Said outright: loaders set a default dtype and device while they build a model.
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")
