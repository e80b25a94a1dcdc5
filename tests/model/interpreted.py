"""The Triton kernels on this processor, against float64 and the ATen compositions; prints the deviations as JSON.

Run in a process of its own with TRITON_INTERPRET=1, which triton reads when it is imported. What decides whether
kernels are used is told yes, so that the autograd steps are gone through as on a device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loratune.model import gated, norm, rotary, triton_blocks

Formula = Callable[..., Tensor]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def product(activation: str) -> Formula:
    return lambda gate, up: gated._ACTIVATIONS[activation][0](gate) * up


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def ours(activation: str) -> Formula:
    return lambda gate, up: gated._Gated.apply(gate, up, gated._Halves(activation))


def cases() -> dict[str, tuple[Formula, Formula, list[Tensor], int]]:
    """Name → (the plain formula, the fused one, inputs, how many of them get a gradient)."""
    torch.manual_seed(0)
    found: dict[str, tuple[Formula, Formula, list[Tensor], int]] = {}
    for shape in ((1, 1, 5), (2, 3, 37), (1, 9, 576)):
        inputs = [torch.randn(shape) * 3, torch.rand(shape[-1]) + 0.5]
        found[f"norm {shape}"] = (rms_norm, lambda x, w: norm.rms_norm(x, w, 1e-5), inputs, 1)
        trained = lambda x, w: norm.rms_norm(x, w, 1e-5, trained=True)  # noqa: E731
        found[f"trained norm {shape}"] = (rms_norm, trained, inputs, 2)
    for activation in gated._ACTIVATIONS:
        for shape in ((1, 1, 7), (1, 3, 1536)):
            pair = [torch.randn(shape) * 3, torch.randn(shape)]
            found[f"{activation} {shape}"] = (product(activation), ours(activation), pair, 2)
        halves = list((torch.randn(1, 5, 66) * 3).chunk(2, -1))
        found[f"{activation} of halves"] = (product(activation), ours(activation), halves, 2)
    for heads, dim in ((1, 2), (3, 64), (9, 24)):
        inputs = [torch.randn(1, 5, heads, dim), *torch.randn(2, 1, 5, 1, dim)]
        found[f"rotary {heads} × {dim}"] = (turned, rotary.rotated, inputs, 1)
    wide = torch.randn(1, 5, 3, 128)[..., :64]
    found["rotary of a part"] = (turned, rotary.rotated, [wide, *torch.randn(2, 1, 5, 1, 64)], 1)
    return found


def deviations(formula: Formula, inputs: list[Tensor], number: int, right: list[Tensor], grad: Tensor) -> float:
    found = results(formula, inputs, number, grad)
    assert all(a.dtype == inputs[0].dtype for a in found)
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, right, strict=True))


def results(formula: Formula, inputs: list[Tensor], number: int, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().as_strided(t.shape, t.stride(), t.storage_offset()) for t in inputs]
    leaves = [t.requires_grad_(i < number) for i, t in enumerate(leaves)]
    y = formula(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves[:number], grad.to(y.dtype))]


def main() -> None:
    used: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            used.append(name)
            return getattr(triton_blocks, name)

    report = {}
    for name, (plain, fused, inputs, number) in cases().items():
        for dtype in (torch.float32, torch.bfloat16):
            given = [t.to(dtype) for t in inputs]
            grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            right = results(plain, [t.double() for t in given], number, grad.double())
            found = {}
            for way in ("aten", "triton"):
                for module in (norm, gated, rotary):
                    module.triton_for = lambda _, way=way: Watched() if way == "triton" else None  # type: ignore[attr-defined]
                found[way] = deviations(fused, given, number, right, grad)
            report[f"{name} {dtype}"] = found
    json.dump({"deviations": report, "used": sorted(set(used))}, sys.stdout)


if __name__ == "__main__":
    main()
