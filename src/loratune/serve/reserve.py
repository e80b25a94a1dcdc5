"""How much of the memory is kept for adapters, before the rest is given to keys and values."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from loratune.adapt.plan import plan_as_written
from loratune.adapter import adapter_folder, count_parameters, read_config
from loratune.config.methods import VERA
from loratune.errors import AdapterFileError
from loratune.lora import base_modules
from loratune.quant import frozen_weight

# What an adapter is taken to be where none is known yet.
_RANK = 16
# Copies of each number in the base's dtype: the stacks, and those that take their place when an adapter comes; the
# blocks; and of two sets of half the adapters both.
_COPIES = 5


def adapters_bytes(model: nn.Module, dtype: torch.dtype, paths: Sequence[str], count: int) -> int:
    """What `count` adapters take on a model that computes in `dtype`, each as large as the largest at `paths`.

    Where none can be read they are taken to be of rank 16 on all linear layers; what is wrong with them is said when
    they are loaded.
    """
    sizes = []
    for path in paths:
        with contextlib.suppress(AdapterFileError):
            sizes.append(_size(model, adapter_folder(path)))
    largest = max(sizes, default=0) or _RANK * _widths(model)
    return count * largest * (torch.float32.itemsize + _COPIES * dtype.itemsize)


def _size(model: nn.Module, folder: Path) -> int:
    """Numbers of an adapter as it is computed with: VeRA's are multiplied into factors, which its file has not."""
    config = read_config(folder).config
    if config.peft_type != VERA:
        return count_parameters(folder)
    return sum(target.multiplied for target in plan_as_written(model, config).targets)


def _widths(model: nn.Module) -> int:
    """Inputs and outputs of all linear layers together: parameters of rank 1."""
    weights = [frozen_weight(module) for _, module in base_modules(model)]
    return sum(weight.in_features + weight.out_features for weight in weights if weight is not None)
