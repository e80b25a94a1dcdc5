"""The rotary embedding in three operations, against the families' own function."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loratune.model.rotary import rotated


def test_output_and_gradient() -> None:
    torch.manual_seed(0)
    x, other = (torch.randn(2, 5, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (3, 1))
    angles = torch.randn(2, 5, 4, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    found = rotated(x, cos.unsqueeze(2), sin.unsqueeze(2))
    expected, _ = apply_rotary_pos_emb(x, other, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], rtol=1e-13, atol=1e-13
    )


def test_angles_of_each_half_are_its_own() -> None:
    """Some families scale the halves differently: nothing may be taken from one half for the other."""
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 1, 3, 6, dtype=torch.float64)
    found = rotated(x, cos.unsqueeze(2), sin.unsqueeze(2))
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("angles", [torch.bfloat16, torch.float32])
def test_the_result_has_the_heads_dtype(angles: torch.dtype, grad: bool) -> None:
    """Also where a family's angles are finer, with and without gradients, bit by bit the same."""
    torch.manual_seed(0)
    x = torch.randn(1, 5, 2, 8).bfloat16()
    turned = (torch.randn(1, 5, 1, 4) * 6).repeat(1, 1, 1, 2)
    with torch.set_grad_enabled(grad):
        found = rotated(x.clone().requires_grad_(grad), turned.cos().to(angles), turned.sin().to(angles))
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(found, rotated(x, turned.cos().to(angles), turned.sin().to(angles)))
    exact = rotated(x.double(), turned.cos().to(angles).double(), turned.sin().to(angles).double())
    assert float((found.detach().double() - exact).norm() / exact.norm()) < 6e-3
