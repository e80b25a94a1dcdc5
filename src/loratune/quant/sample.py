"""What a tensor is known by once it is no longer there as it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLE = 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """A tensor's shape, and up to 1024 of its values, evenly spaced and rounded to bf16, on the CPU.

    Rounded, so that one base loaded in fp32 and in bf16 is one base; sampled, so that a large one takes seconds.
    """

    shape: tuple[int, ...]
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Sample:
        flat = tensor.detach().reshape(-1)
        taken = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
        # Copied: a view would keep all of the tensor alive.
        return cls(tuple(tensor.shape), taken.to("cpu", torch.bfloat16, copy=True))
