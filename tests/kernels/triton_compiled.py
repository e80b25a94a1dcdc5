"""Compiles every kernel in Triton for a GPU, which needs none; run as a program, prints each kernel's name."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loratune.kernels import triton_blocks

POINTERS = {"x", "y", "weight", "gx", "gy", "gate", "up", "g_gate", "g_up", "cos", "sin"}
CONSTANTS: dict[str, tuple[Any, ...]] = {
    "ROWS": (1, 16),
    "WIDTH": (16, 2048),
    "ACTIVATION": ("silu", "gelu", "gelu_tanh"),
    "TILE": (triton_blocks._TILE,),
    "BACK": (False, True),
    "HEADS": (1, 16),
    "HALF": (1, 64),
}
KERNELS = ("_norm_forward", "_norm_backward", "_gated_forward", "_gated_backward", "_turn")


def signature(names: list[str], pointer: str, ones: bool) -> dict[str, str]:
    """Types of a kernel's arguments; Triton makes a constant of a whole number that is 1."""
    found = {}
    for name in names:
        if name in POINTERS:
            found[name] = pointer
        elif name == "inverse":
            found[name] = "*fp32"
        elif name == "eps":
            found[name] = "fp32"
        else:
            found[name] = "constexpr" if name in CONSTANTS or ones else "i32"
    return found


def main() -> None:
    for name in KERNELS:
        kernel = getattr(triton_blocks, name)
        names = list(inspect.signature(kernel.fn).parameters)
        own = [constant for constant in names if constant in CONSTANTS]
        for values in product(*(CONSTANTS[constant] for constant in own)):
            for pointer, ones in (("*bf16", False), ("*fp32", True)):
                types = signature(names, pointer, ones)
                constants: dict[str, Any] = {arg: 1 for arg, type_ in types.items() if type_ == "constexpr"}
                constants.update(zip(own, values, strict=True))
                source = ASTSource(kernel, types, constexprs=constants)
                triton.compile(source, target=GPUTarget("cuda", 80, 32))
        print(name, flush=True)


if __name__ == "__main__":
    main()
