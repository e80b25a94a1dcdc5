"""One pass over the weights: are they finite, and which base is this?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from loratune.errors import ModelError

_SAMPLE = 1024


def fingerprint(tensors: Iterable[tuple[str, Tensor]], *, finite: bool = True) -> str:
    """A hash of names, shapes and up to 1024 evenly spaced values of each tensor, rounded to bf16.

    Rounded, so that one base loaded in fp32 and in bf16 is one base; sampled, so that a large one takes seconds.

    Args:
        finite: look at every value too.

    Raises:
        ModelError: some weights are NaN or infinite; all are named.
    """
    digest = hashlib.sha256()
    broken = []
    for name, tensor in tensors:
        values = tensor.detach().reshape(-1)
        if finite and not bool(torch.isfinite(values).all()):
            broken.append(f"{name}: holds NaN or infinity")
        sample = values[:: max(1, values.numel() // _SAMPLE)][:_SAMPLE].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    if broken:
        raise ModelError(broken, hint="the base's files are damaged: fetch or convert them again")
    return digest.hexdigest()
