"""What the kernels must give: those in C, and those in Triton on a GPU or on a CPU by Triton's interpreter.

Run as a program with TRITON_INTERPRET=1, which Triton reads once when it is imported: prints a JSON object, case →
traceback, or null where it passed.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import loratune as lt
from loratune.data.batch import make_batch
from loratune.kernels import chosen as chosen_kernels
from loratune.loss import summed_loss
from loratune.model import fuse, gated, norm, rotary, use_packed_attention
from tests.models import PAD, rows_of, tiny

Case = Callable[[torch.device], None]
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# The module whose kernels are looked at.
written_in = "triton_blocks"


def kernels() -> Any:
    return importlib.import_module(f"loratune.kernels.{written_in}")


def by_kernels(x: Tensor) -> Any:
    """In the place of `kernels_for`, which chooses by device."""
    return None if x.dtype == torch.float64 else kernels()


def drawn(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shapes[0]))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Within half a unit in the last place of the float64 value, or a few of fp32 where sums are in it.

    Triton's interpreter cuts bf16 off instead of rounding it, which is a whole unit.
    """
    assert exact.dtype == torch.float64
    assert found.shape == exact.shape
    eps = torch.finfo(found.dtype).eps
    cuts_off = written_in == "triton_blocks" and not found.is_cuda
    room = 16 * eps if found.dtype == torch.float32 else (1.01 if cuts_off else 0.51) * eps
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=room, atol=scale * 2e-6)


def gradients(y: Tensor, inputs: list[Tensor], gy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, gy))


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@case
def norm_is_the_formula_rounded_once(device: torch.device) -> None:
    for dtype in DTYPES:
        for shape in ((1, 1, 16), (1, 5, 576), (2, 3, 1536), (1, 7, 100), (1, 1, 2049), (1, 9, 3, 24)):
            x, weight, gy = drawn(device, dtype, shape, shape[-1:], shape)
            y, inverse = kernels().norm_forward(x, weight, 1e-5)
            x64, w64, y64 = wide(x, weight, y)
            assert_rounded_once(y, x64 * (x64.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w64)
            torch.testing.assert_close(
                inverse.double(), (x64.square().mean(-1, keepdim=True) + 1e-5).rsqrt(), rtol=1e-6, atol=0.0
            )
            # In the backward pass from what was kept: y as it was rounded.
            found, kept = kernels().norm_backward(gy, y, weight, inverse), inverse.double()
            inner = (gy.double() * y64).mean(-1, keepdim=True)
            assert_rounded_once(found, (gy.double() * w64 - y64 / w64 * inner) * kept)


@case
def norm_is_the_one_without_kernels(device: torch.device) -> None:
    for dtype, near in zip(DTYPES, (1e-6, 2**-7), strict=True):
        for weight_dtype in (dtype, torch.float32):
            x, weight, gy = drawn(device, dtype, (1, 6, 96), (96,), (1, 6, 96))
            weight = weight.to(weight_dtype)
            results = []
            for chosen in (lambda _: None, by_kernels):
                x = x.detach().requires_grad_()
                with mock.patch.object(norm, "kernels_for", chosen):
                    y = norm.rms_norm(x, weight, 1e-5)
                    results.append([y, *gradients(y, [x], gy)])
            for stock, found in zip(*results, strict=True):
                torch.testing.assert_close(found, stock, rtol=near, atol=near)


@case
def norm_takes_heads_out_of_a_wider_projection(device: torch.device) -> None:
    x, weight, gy = drawn(device, torch.float32, (1, 6, 3, 5, 16), (16,), (1, 5, 6, 16))
    x, gy = x[:, :, 1], gy.transpose(1, 2)
    assert not x.is_contiguous()
    assert not gy.is_contiguous()
    y, inverse = kernels().norm_forward(x, weight, 1e-5)
    again, kept = kernels().norm_forward(x.contiguous(), weight, 1e-5)
    assert torch.equal(y, again)
    assert torch.equal(
        kernels().norm_backward(gy, y, weight, inverse), kernels().norm_backward(gy.contiguous(), y, weight, kept)
    )


@case
def product_is_the_formula_rounded_once(device: torch.device) -> None:
    for name, act in ACTIVATIONS.items():
        for dtype in DTYPES:
            for shape in ((1, 1, 1), (1, 3, 576), (2, 2, 1536), (1, 5, 1023)):
                gate, up, gy = drawn(device, dtype, shape, shape, shape)
                gate = gate * 4
                inputs = wide(gate, up)
                exact = act(inputs[0]) * inputs[1]
                assert_rounded_once(kernels().gated_forward(gate, up, name), exact)
                found = kernels().gated_backward(gy, gate, up, name)
                for mine, right in zip(found, gradients(exact, inputs, gy.double()), strict=True):
                    assert_rounded_once(mine, right)


@case
def product_of_large_numbers_is_finite(device: torch.device) -> None:
    gate = torch.tensor([[-1e4, -300.0, -90.0, 0.0, 90.0, 300.0, 1e4]], device=device)
    for name, act in ACTIVATIONS.items():
        one = torch.ones_like(gate)
        torch.testing.assert_close(kernels().gated_forward(gate, one, name), act(gate))
        slope, active = kernels().gated_backward(one, gate, one, name)
        torch.testing.assert_close(active, act(gate))
        torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]], device=device))


@case
def product_takes_the_halves_of_one_projection(device: torch.device) -> None:
    both, wider, turned = drawn(device, torch.bfloat16, (1, 5, 2 * 77), (1, 5, 100), (77, 5, 1))
    gate, up = both.chunk(2, -1)
    plain = [t.contiguous() for t in (gate, up)]
    assert torch.equal(kernels().gated_forward(gate, up, "silu"), kernels().gated_forward(*plain, "silu"))
    for gy in (wider[..., :77], turned.permute(2, 1, 0)):
        assert not gy.is_contiguous()
        found = kernels().gated_backward(gy, gate, up, "silu")
        for mine, right in zip(found, kernels().gated_backward(gy.contiguous(), *plain, "silu"), strict=True):
            assert torch.equal(mine, right)


@case
def product_is_the_one_without_kernels(device: torch.device) -> None:
    for name in ACTIVATIONS:
        for dtype, near in zip(DTYPES, (1e-6, 2**-6), strict=True):
            gate, up, gy = drawn(device, dtype, *[(1, 6, 96)] * 3)
            results = []
            for chosen in (lambda _: None, by_kernels):
                inputs = [t.detach().requires_grad_() for t in (gate, up)]
                with mock.patch.object(gated, "kernels_for", chosen):
                    y = gated._Gated.apply(*inputs, gated._Halves(name))
                    results.append([y, *gradients(y, inputs, gy)])
            for stock, found in zip(*results, strict=True):
                torch.testing.assert_close(found, stock, rtol=near, atol=near)


@case
def rotation_is_the_families(device: torch.device) -> None:
    """Heads out of a wider projection, gradients that come head by head, and angles of each half its own."""
    for dtype in DTYPES:
        for tokens, heads, dim in ((1, 1, 2), (5, 9, 64), (4, 3, 24), (3, 40, 128)):
            both, cos, sin, gy = drawn(
                device, dtype, (1, tokens, 2, heads, dim), *[(1, tokens, dim)] * 2, (1, heads, tokens, dim)
            )
            x, gy = both[:, :, 1], gy.transpose(1, 2)
            x64, cos64, sin64 = wide(x, cos, sin)
            exact, _ = apply_rotary_pos_emb(x64, x64, cos64, sin64, unsqueeze_dim=2)
            found = kernels().rotate(x, cos.unsqueeze(2), sin.unsqueeze(2))
            assert found.is_contiguous()
            assert_rounded_once(found, exact)
            back = kernels().rotate(gy, cos.unsqueeze(2), sin.unsqueeze(2), back=True)
            assert_rounded_once(back, gradients(exact, [x64], gy.double())[0])


@case
def rotation_is_the_one_without_kernels(device: torch.device) -> None:
    for dtype, near in zip(DTYPES, (1e-6, 2**-6), strict=True):
        for angles in (dtype, torch.float32):
            x, gy = drawn(device, dtype, *[(2, 5, 3, 12)] * 2)
            # One row of angles for both rows of a batch.
            cos, sin = drawn(device, angles, *[(1, 5, 1, 12)] * 2)
            results = []
            for chosen in (lambda _: None, by_kernels):
                x = x.detach().requires_grad_()
                with mock.patch.object(rotary, "kernels_for", chosen):
                    y = rotary.rotated(x, cos, sin)
                    results.append([y, *gradients(y, [x], gy.to(y.dtype))])
            for stock, found in zip(*results, strict=True):
                torch.testing.assert_close(found, stock, rtol=near, atol=near)


@case
def a_models_loss_and_gradients_are_the_same(device: torch.device) -> None:
    """Through the fused modules, with what is computed again in the backward pass."""
    called: list[Tensor] = []

    def noting(x: Tensor) -> Any:
        called.append(x)
        return by_kernels(x)

    # Norms of heads, an activation that is no silu, and gate and up as halves of one projection.
    for family, activation in (("qwen3", "silu"), ("gemma3", "gelu_pytorch_tanh"), ("phi3", "silu")):
        model = tiny(family).to(device)
        assert getattr(model.config, "hidden_activation", getattr(model.config, "hidden_act", None)) == activation
        handle = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear"))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        use_packed_attention(model)
        fuse(model)
        batch = make_batch(rows_of(9, 14, 2), packed=True, pad_id=PAD).to(device)
        results = []
        called.clear()
        for chosen in (lambda _: None, noting):
            with (
                mock.patch.object(norm, "kernels_for", chosen),
                mock.patch.object(gated, "kernels_for", chosen),
                mock.patch.object(rotary, "kernels_for", chosen),
            ):
                loss = summed_loss(model, batch)
                results.append([loss.detach(), *torch.autograd.grad(loss, list(handle.parameters()))])
        assert called
        for stock, found in zip(*results, strict=True):
            torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)


@case
def kernels_pass_their_trial(device: torch.device) -> None:
    furthest, _ = chosen_kernels._furthest(kernels(), device)
    assert 0 < furthest <= 1


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, str | None] = {}
    for name, check in CASES.items():
        try:
            check(torch.device("cpu"))
            results[name] = None
        except Exception:  # noqa: BLE001 - each case is reported
            results[name] = traceback.format_exc()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
