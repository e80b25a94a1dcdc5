"""Which tensors the Triton kernels compute: those on a CUDA device. Torch's CUDA wheels bring triton along."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_for(tensor: Tensor) -> ModuleType | None:
    """`triton_blocks`, or None where the same formulas are computed by torch's own operations.

    The kernels compute in fp32, so that finer tensors go without.
    """
    return _triton_blocks() if tensor.is_cuda and tensor.dtype in _DTYPES else None


@cache
def _triton_blocks() -> ModuleType | None:
    """None where triton is missing, or cannot compile here (no C compiler, a card that is too old)."""
    if importlib.util.find_spec("triton") is None:
        return None
    blocks = importlib.import_module("loratune.model.triton_blocks")
    try:
        ones = torch.ones(1, 2, device="cuda")
        blocks.rms_norm(ones, ones[0], 1e-5)
    except Exception:  # noqa: BLE001  # whatever a compiler raises: torch's own operations do the same
        return None
    return blocks
