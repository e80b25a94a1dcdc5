"""One pass over the weights: are they finite, which base is this, and has any bit of them changed?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from loratune.errors import ModelError
from loratune.quant import Sample

_PIECE = 1 << 18


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


def exact_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of every value of every tensor, for one process to see whether anything has changed.

    On the CPU it is that of the bytes. Elsewhere it is that of sums over pieces, each value's bits weighted by an odd
    number of its place, so that the weights need not leave the device.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().contiguous().view(-1)
        on_cpu = flat.view(torch.uint8) if flat.device.type == "cpu" else _weighted_sums(flat).cpu()
        digest.update(on_cpu.numpy().data)
    return digest.hexdigest()


def _weighted_sums(flat: Tensor) -> Tensor:
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    weights = 2 * torch.arange(_PIECE, device=flat.device) + 1
    sums = [(piece * weights[: len(piece)]).sum() for piece in bits.split(_PIECE)]
    return torch.stack(sums)
