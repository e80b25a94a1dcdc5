"""One pass over the weights: are they finite, and which base is this?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from loratune.errors import ModelError
from loratune.quant import Sample


def fingerprint(tensors: Iterable[tuple[str, Tensor | Sample]], *, finite: bool = True) -> str:
    """A hash of names, shapes and a sample of each tensor.

    Args:
        finite: look at every value too.

    Raises:
        ModelError: some weights are NaN or infinite; all are named.
    """
    digest = hashlib.sha256()
    broken = []
    for name, tensor in tensors:
        if finite and isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            broken.append(f"{name}: holds NaN or infinity")
        sample = Sample.of(tensor) if isinstance(tensor, Tensor) else tensor
        digest.update(f"{name}{sample.shape}".encode())
        digest.update(sample.values.view(torch.int16).numpy().tobytes())
    if broken:
        raise ModelError(broken, hint="the base's files are damaged: fetch or convert them again")
    return digest.hexdigest()
