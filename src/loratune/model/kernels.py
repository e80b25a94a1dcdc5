"""Which tensors the Triton kernels compute: those on a CUDA device. Torch's CUDA wheels bring triton along."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from torch import Tensor


def triton_for(tensor: Tensor) -> ModuleType | None:
    """`triton_blocks`, or None where the same formulas are computed by torch's own operations."""
    return _triton_blocks() if tensor.is_cuda else None


@cache
def _triton_blocks() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("loratune.model.triton_blocks")
