"""Which kernels compute the blocks of a device: those in Triton on CUDA, those in C on a CPU, or none.

They are used where they can be had, and give what the plain formulas give.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from loratune.kernels.adapted import Adapted
from loratune.kernels.deviation import deviation, furthest
from loratune.kernels.lanes import table_of

# Tokens of the trial's longest lane: more keys than are computed together.
_LONG = 290
# The kernels compute in fp32; in float64 they would lose half of the digits.
_DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
# Of results in fp32, and of those whose products are in bf16.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

_log = logging.getLogger("loratune")


class Kernels(NamedTuple):
    """What computes the blocks of a device.

    Attributes:
        module: the kernels, or None where torch's own operations do it.
        named: which it is, and why it is no better.
    """

    module: ModuleType | None
    named: str


def kernels_for(x: Tensor) -> ModuleType | None:
    """The kernels that can compute what x goes into, else None; tried once for each device."""
    if x.dtype not in _DTYPES.get(x.device.type, ()) or not _plain(x):
        return None
    return kernels_of(x.device).module


def _plain(x: Tensor) -> bool:
    """Whether x has the memory that it seems to have, and operations mean what they say."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    # Whoever writes down what torch does (a trace, fake tensors, a count of operations) sees nothing of kernels; nor do
    # tangents of a forward mode.
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    return has_plain_memory(x)


def has_plain_memory(x: Tensor) -> bool:
    """Whether what x holds is where it says."""
    return type(x) in (Tensor, torch.nn.Parameter)


@lru_cache(maxsize=64)
def kernels_of(device: torch.device) -> Kernels:
    """The kernels for a device, if they are there and give what the plain formulas give."""
    try:
        module = _module_for(device)
        most, name = _furthest(module, device)
    except _MissingError as error:
        return Kernels(None, f"torch's own operations: {error}")
    except Exception as error:  # noqa: BLE001 - Triton and the C compiler that it calls raise what they like
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        if most <= 1:
            return Kernels(module, str(module.NAMED))
        why = f"{name} deviates from the plain formula {most:.3g} times as far as rounding explains"
    _log.warning("fused blocks take torch's own operations, which is slower: the kernels failed here (%s)", why)
    return Kernels(None, f"torch's own operations: kernels failed ({why})")


class _MissingError(Exception):
    """There are no kernels to try."""


def _module_for(device: torch.device) -> ModuleType:
    """Importing loratune must import no Triton and compile nothing, nor may these be needed."""
    if device.type == "cpu":
        try:
            from loratune.kernels import c_blocks
        except OSError as error:
            raise _MissingError(error) from None
        return c_blocks
    if not triton_available(device):
        raise _MissingError("there is no Triton for it")
    from loratune.kernels import triton_blocks

    return triton_blocks


def triton_available(device: torch.device) -> bool:
    """Whether kernels can be written in Triton there: torch's CUDA wheels bring it, other builds may not."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    # Triton compiles for Volta and later; AMD's devices number theirs from 9.
    return torch.cuda.get_device_capability(device)[0] >= 7


def _furthest(kernels: ModuleType, device: torch.device) -> tuple[float, str]:
    """The largest deviation of a kernel's result from the plain formula's, by its tolerance, and the kernel's name."""
    # Hooks of a caller (recomputation counts what is kept) are none of this one's; nor is its mode.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
        return furthest(
            (deviation(mine.detach(), right.detach()) / _TOLERANCES[mine.dtype], name)
            for tried in _TRIALS
            for name, mine, right in tried(kernels, device)
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


def _attentions(kernels: ModuleType, device: torch.device) -> Pairs:
    if hasattr(kernels, "attend_forward"):
        yield from _attention(kernels, device, torch.float32)
    if kernels.in_tiles(torch.bfloat16):
        yield from _attention(kernels, device, torch.bfloat16)


def _attention(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> Pairs:
    """Two branches of one prefix, a row that starts afresh, and a window that cuts the prefix."""
    segments, above = (5, 4, 3, _LONG), ((), (0,), (0,), ())
    tokens = sum(segments)
    node = torch.repeat_interleave(torch.arange(4), torch.tensor(segments))
    position = torch.cat([torch.arange(5), torch.arange(5, 9), torch.arange(5, 8), torch.arange(_LONG)])
    age = position[:, None] - position
    related = (node[:, None] == node) | ((node == 0) & (node[:, None] < 3))
    drawn = _drawn(device, (tokens, 4, 16), (tokens, 2, 16), (tokens, 2, 32), (tokens, 4, 32))
    q, k, v, gy = (t.to(dtype).float() for t in drawn)
    for window in (None, 4):
        hidden = ~(related & (age >= 0) & (age < (window or tokens)))
        keys, values = (t.repeat_interleave(2, 1).transpose(0, 1) for t in (k, v))
        scores = (q.transpose(0, 1) @ keys.mT * 0.3).masked_fill(hidden, -torch.inf)
        y = (scores.softmax(-1) @ values).transpose(0, 1)
        told = (table_of(segments, above, window), window, 0.3)
        plain = [t.detach().to(dtype) for t in (gy, q, k, v)]
        found, totals = kernels.attend_forward(*plain[1:], *told)
        yield "attention", found, y
        mine = kernels.attend_backward(*plain, found, totals, *told)
        for found, right in zip(mine, torch.autograd.grad(y, (q, k, v), gy), strict=True):
            yield "attention's gradient", found, right


def _losses(kernels: ModuleType, device: torch.device) -> Pairs:
    if not hasattr(kernels, "cross_entropy"):
        return
    logits, times = _drawn(device, (5, 700), (5,))
    targets = torch.tensor([0, 699, 3, 8, 350], device=device)
    lost = F.cross_entropy(logits * 9, targets, reduction="none") * times
    slope = torch.full_like(logits, torch.nan).detach()
    yield "cross-entropy", kernels.cross_entropy((logits * 9).detach(), targets, times.detach(), slope), lost
    yield "cross-entropy's gradient", slope * 9, torch.autograd.grad(lost.sum(), logits)[0]


def _sums(kernels: ModuleType, device: torch.device) -> Pairs:
    """Of two products, whose right factors lie by rows and by columns, added to something; and over rows."""
    if not kernels.in_tiles(torch.bfloat16):
        return
    with torch.no_grad():
        drawn = _drawn(device, (50, 40), (40, 72), (50, 64), (72, 64), (50, 72), (64, 20))
        x, w, z, turned, into, thin = (t.bfloat16() for t in drawn)
        both = x.float() @ w.float() + z.float() @ turned.float().T
        yield "the sum of products", kernels.sum_of_products([(x, w), (z, turned.T)], 0.5, None), (both / 2).bfloat16()
        right = (into.float() + both).bfloat16()
        yield "the sum of products", kernels.sum_of_products([(x, w), (z, turned.T)], 1.0, into), right
        yield "the product of few columns", kernels.sum_of_products([(z, thin)], 1.0, None), (z @ thin)
        for left, side in ((x, z), (z, x)):
            yield "the product over rows", kernels.product_over_rows(left, side), left.float().T @ side.float()


def _adaptations(kernels: ModuleType, device: torch.device) -> Pairs:
    """Two projections of one x, of which one has a bias, masters in fp32 and bf16, and W by rows and by columns."""
    if not kernels.in_tiles(torch.bfloat16):
        return
    drawn = _drawn(device, (50, 40), (72, 40), (40, 24), (72,), (4, 40), (72, 4), (20, 40), (24, 20))
    x, w, turned, b = (t.detach().bfloat16() for t in drawn[:4])
    A, B, other_A, other_B = ((t.detach() / 4).bfloat16() for t in drawn[4:])
    projections = [Adapted(w, A.float(), B.float(), 0.5, b), Adapted(turned.T, other_A, other_B, 2.0)]
    with torch.no_grad():
        ys, h = kernels.low_rank_forward(x, projections)
        parts, grads, gx = h.split([4, 20], 1), [(y + 1).detach() for y in ys], torch.zeros(50, 40)
        found = kernels.low_rank_backward(x, h, grads, projections, [(True, True)] * 2, wants_x=True)
        for p, y, part, gy, gA, gB in zip(projections, ys, parts, grads, *found[1:], strict=True):
            weight, A, B = (t.float() for t in (p.weight, p.A, p.B))
            right = (x.float() @ A.T * p.scale).bfloat16()
            yield "A x", part, right
            shift = 0.0 if p.bias is None else p.bias.float()
            yield "W x + B A x", y, (x.float() @ weight.T + shift + part.float() @ B.T).bfloat16()
            gh = (gy.float() @ B * p.scale).bfloat16().float()
            gx += gy.float() @ weight + gh @ A
            yield "the gradient of A", gA, gh.T @ x.float()
            yield "the gradient of B", gB, gy.float().T @ part.float()
        yield "the gradient of x", found[0], gx.bfloat16()


_TRIALS: tuple[Callable[[ModuleType, torch.device], Pairs], ...] = (
    _norms, _products, _turns, _attentions, _losses, _sums, _adaptations,
)  # fmt: skip
