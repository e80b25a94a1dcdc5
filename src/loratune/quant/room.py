"""A piece of memory that decoded weights have one after the other.

A decoded weight lives for one product. Taken from the heap each time, beside results that stay, they would leave holes
into which the next one does not fit: a process grew by the size of the dense model in one forward pass.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_held = threading.local()


def room(count: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A flat tensor of at least `count` values, the same one again for each call on this thread; not filled.

    None on devices whose allocators put freed memory together again.
    """
    if device.type != "cpu":
        return None
    tensors: dict[torch.dtype, Tensor] = vars(_held).setdefault("tensors", {})
    if dtype not in tensors or len(tensors[dtype]) < count:
        with torch.inference_mode(False):  # one that is made inside could not be written outside
            tensors[dtype] = torch.empty(count, dtype=dtype, device=device)
    return tensors[dtype]
