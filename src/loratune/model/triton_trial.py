"""Where the kernels written in Triton are used: on CUDA, if Triton is there and gives what the plain formulas give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from loratune.model.device import triton_available
from loratune.model.fused import deviation, furthest

# The kernels compute in fp32; in float64 they would lose half of the digits.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = 1e-5
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

_log = logging.getLogger("loratune")


def kernels_for(x: Tensor) -> ModuleType | None:
    """`triton_blocks` if its kernels can compute what x goes into, else None; tried once for each device."""
    if not x.is_cuda or x.dtype not in _DTYPES or torch.compiler.is_compiling():
        return None
    return _tried(x.device)


@lru_cache(maxsize=64)
def _tried(device: torch.device) -> ModuleType | None:
    if not triton_available(device):
        return None
    try:
        # Importing loratune must not import Triton, nor may it be needed.
        from loratune.model import triton_blocks

        most, name = _furthest(triton_blocks, device)
    except Exception as error:  # noqa: BLE001 - Triton and the C compiler that it calls raise what they like
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        if most <= _TOLERANCE:
            return triton_blocks
        why = f"{name} deviates from the plain formula by {most:.1e}"
    _log.warning("fused blocks take torch's own kernels, which is slower: those in Triton failed here (%s)", why)
    return None


def _furthest(kernels: ModuleType, device: torch.device) -> tuple[float, str]:
    """The largest relative deviation of a kernel's result from the plain formula's, and the kernel's name."""
    # Hooks of a caller (recomputation counts what is kept) are none of this one's; nor is its mode.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
        return furthest(
            (deviation(mine.detach(), right.detach()), name)
            for name, mine, right in (*_norms(kernels, device), *_products(kernels, device), *_turns(kernels, device))
        )


Pairs = Iterator[tuple[str, Tensor, Tensor]]


def _drawn(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def _norms(kernels: ModuleType, device: torch.device) -> Pairs:
    x, weight, gy = _drawn(device, (3, 100), (100,), (3, 100))
    inverse = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    y = x * inverse * weight
    mine, kept = kernels.norm_forward(x.detach(), weight.detach(), 1e-5)
    yield from (("the norm", mine, y), ("the norm", kept, inverse))
    gx = kernels.norm_backward(gy.detach(), mine, weight.detach(), kept)
    yield "the norm's gradient", gx, torch.autograd.grad(y, x, gy)[0]


def _products(kernels: ModuleType, device: torch.device) -> Pairs:
    gate, up, gy = _drawn(device, *[(3, 100)] * 3)
    for name, act in _ACTIVATIONS.items():
        y = act(gate) * up
        yield f"the product with {name}", kernels.gated_forward(gate.detach(), up.detach(), name), y
        mine = kernels.gated_backward(gy.detach(), gate.detach(), up.detach(), name)
        for found, right in zip(mine, torch.autograd.grad(y, (gate, up), gy), strict=True):
            yield f"the gradient of the product with {name}", found, right


def _turns(kernels: ModuleType, device: torch.device) -> Pairs:
    x, cos, sin, gy = _drawn(device, (3, 5, 12), (3, 1, 12), (3, 1, 12), (3, 5, 12))
    x1, x2 = x.chunk(2, -1)
    y = x * cos + torch.cat([-x2, x1], -1) * sin
    yield "the rotation", kernels.rotate(x.detach(), cos.detach(), sin.detach()), y
    mine = kernels.rotate(gy.detach(), cos.detach(), sin.detach(), back=True)
    yield "the rotation's gradient", mine, torch.autograd.grad(y, x, gy)[0]
