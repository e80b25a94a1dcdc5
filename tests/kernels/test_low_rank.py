"""The equation of low-rank adaptation in one call: the bits of its products one after the other, and fp64's numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loratune.kernels import (
    Adapted,
    adapted_in_tiles,
    c_blocks,
    gradients_in_tiles,
    low_rank,
    product_over_rows,
    sum_of_products,
)
from loratune.lora import linear
from loratune.lora.linear import Projection, lora_linears
from loratune.quant.weight import DenseWeight
from tests.kernels.test_products import by_columns, drawn

pytestmark = pytest.mark.skipif(not c_blocks.TILES, reason="the processor has no matrix unit")
WIDTHS = [1, 8, 16, 24, 31, 32, 33, 64, 130]


def projections_of(draw: random.Random, inner: int, number: int) -> list[Adapted]:
    """Of any widths, ranks and scales; weights by rows and by columns, masters in fp32 and in bf16."""
    alike, found = draw.random() < 0.5, []
    for _ in range(number):
        out, r = draw.choice(WIDTHS), draw.choice([1, 4, 16, 17, 40])
        weight = draw.choice([drawn, by_columns])(out, inner, among=draw.choice([0, 3]))
        A, B = (
            torch.randn(*shape).to(draw.choice([torch.float32, torch.bfloat16])) for shape in ((r, inner), (out, r))
        )
        bias = draw.choice([None, torch.randn(out).bfloat16()])
        found.append(Adapted(weight, A, B, 0.5 if alike else draw.choice([0.25, 2.0, 0.3]), bias))
    return found


def one_after_the_other(x: Tensor, projections: list[Adapted]) -> tuple[list[Tensor], list[Tensor]]:
    ys, hs = [], []
    for weight, A, B, scale, bias in projections:
        h = sum_of_products([(x, A.bfloat16().T)], scale)
        shift = [] if bias is None else [(x.new_ones(len(x), 1), bias[None])]
        ys.append(sum_of_products([(x, weight.T), *shift, (h, B.bfloat16().T)]))
        hs.append(h)
    return ys, hs


def gradients_one_after_the_other(
    x: Tensor, hs: list[Tensor], grads: list[Tensor], projections: list[Adapted]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    ghs = [sum_of_products([(gy, p.B.bfloat16())], p.scale) for gy, p in zip(grads, projections, strict=True)]
    A = torch.cat([p.A.bfloat16() for p in projections])
    products = [(gy, p.weight) for gy, p in zip(grads, projections, strict=True)]
    gx = sum_of_products([*products, (torch.cat(ghs, 1), A)])
    gA = [product_over_rows(gh, x) for gh in ghs]
    return gx, gA, [product_over_rows(gy, h) for gy, h in zip(grads, hs, strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_the_bits_of_one_product_after_the_other(seed: int) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    rows, inner = draw.choice([32, 33, 47, 64, 200, 301]), draw.choice(WIDTHS)
    projections = projections_of(draw, inner, draw.randint(1, 4))
    x = drawn(rows, inner, among=draw.choice([0, 3]))
    found = adapted_in_tiles(x, projections)
    assert found is not None
    ys, hs = one_after_the_other(x, projections)
    assert all(torch.equal(a, b) for a, b in zip(found[0], ys, strict=True))
    assert torch.equal(found[1], torch.cat(hs, 1))

    grads = [drawn(rows, len(p.B), among=draw.choice([0, 1])) for p in projections]
    wanted = [(draw.random() < 0.8, draw.random() < 0.8) for _ in projections]
    wants_x = draw.random() < 0.8
    gradients = gradients_in_tiles(x, found[1], grads, projections, wanted, wants_x=wants_x)
    assert gradients is not None
    gx, gA, gB = gradients_one_after_the_other(x, hs, grads, projections)
    assert torch.equal(gradients[0], gx) if wants_x else gradients[0] is None
    for mine, right in zip(gradients[1] + gradients[2], gA + gB, strict=True):
        assert mine is None or torch.equal(mine, right)
    assert [(a is not None, b is not None) for a, b in zip(*gradients[1:], strict=True)] == wanted


def test_the_numbers_of_fp64() -> None:
    """So that what is one after the other is not wrong in the same way; B x of a master in fp32 is rounded once."""
    torch.manual_seed(0)
    x, weight, gy = drawn(301, 576), drawn(200, 576), drawn(301, 200)
    A, B, bias = torch.randn(16, 576) / 24, torch.randn(200, 16) / 4, drawn(1, 200)[0]
    (y,), h = adapted_in_tiles(x, [Adapted(weight, A, B, 0.5, bias)])  # type: ignore[misc]
    gx, (gA,), (gB,) = gradients_in_tiles(x, h, [gy], [Adapted(weight, A, B, 0.5)], [(True, True)], wants_x=True)  # type: ignore[misc]
    X, W, G, A, B = (t.double() for t in (x, weight, gy, A, B))
    gh = 0.5 * G @ B
    right = [
        X @ W.T + bias.double() + 0.5 * X @ A.T @ B.T,
        0.5 * X @ A.T,
        G @ W + gh @ A,
        gh.T @ X,
        0.5 * G.T @ X @ A.T,
    ]
    for mine, exact in zip((y, h, gx, gA, gB), right, strict=True):
        assert float((mine - exact).norm() / exact.norm()) < 4e-3


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    draw = random.Random(1)
    projections, x = projections_of(draw, 130, 3), drawn(301, 130)
    grads = [drawn(301, len(p.B)) for p in projections]

    def everything() -> list[Any]:
        ys, h = c_blocks.low_rank_forward(x, projections)
        gx, gA, gB = c_blocks.low_rank_backward(x, h, grads, projections, [(True, True)] * 3, wants_x=True)
        return [*ys, h, gx, *gA, *gB]

    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            found.append(everything())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_it_does_not_take_is_left_to_others() -> None:
    x, one = drawn(40, 64), Adapted(drawn(48, 64), torch.randn(4, 64), torch.randn(48, 4), 1.0)
    assert adapted_in_tiles(x, [one]) is not None
    others = [
        (x[:31], one),
        (x.float(), one),
        (by_columns(40, 64), one),
        (x, one._replace(weight=one.weight.float())),
        (x, one._replace(weight=drawn(48, 128)[:, ::2])),
        (x, one._replace(A=one.A.double())),
        (x, one._replace(A=by_columns(4, 64))),
        (x, one._replace(B=one.B[:, :0], A=one.A[:0])),
        (x, one._replace(B=torch.nn.Buffer(one.B).as_subclass(type("Other", (Tensor,), {})))),
        (x, one._replace(bias=torch.randn(48))),
        (x, one._replace(bias=drawn(48, 2)[:, 0])),
    ]
    for seen, projection in others:
        assert adapted_in_tiles(seen, [projection]) is None
        assert (
            gradients_in_tiles(
                seen, drawn(len(seen), 4), [drawn(len(seen), 48)], [projection], [(True, True)], wants_x=True
            )
            is None
        )
    assert adapted_in_tiles(x, []) is None
    for h, gy in ((drawn(40, 4).float(), drawn(40, 48)), (drawn(40, 4), by_columns(40, 48))):
        assert gradients_in_tiles(x, h, [gy], [one], [(True, True)], wants_x=True) is None


@pytest.mark.parametrize(("longest", "forth", "back"), [(69, True, True), (68, False, True), (51, False, False)])
def test_longer_sums_are_left_to_others(longest: int, forth: bool, back: bool, monkeypatch: Any) -> None:
    """64 terms, a bias and 4 forth, 48 and 4 back."""
    monkeypatch.setattr(low_rank, "LONGEST", longest)
    x, one = drawn(40, 64), Adapted(drawn(48, 64), torch.randn(4, 64), torch.randn(48, 4), 1.0)
    assert (adapted_in_tiles(x, [one]) is not None) == forth
    found = gradients_in_tiles(x, drawn(40, 4), [drawn(40, 48)], [one], [(True, True)], wants_x=True)
    assert (found is not None) == back


class Passing(DenseWeight):
    """One whose memory is another's once that is asked for."""

    @property
    def lasting(self) -> bool:
        return False


def weight_of(out: int, kind: type[DenseWeight] = DenseWeight) -> DenseWeight:
    return kind("Linear", torch.nn.Parameter(drawn(out, 64), requires_grad=False), False)


def halved(x: Tensor) -> Tensor:
    """In the place of dropout: linear, and the same whenever it is called."""
    return x * torch.tensor([0.0, 2.0], dtype=x.dtype).repeat(x.shape[-1] // 2)


def projection_of(weight: DenseWeight, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Projection:
    def base(seen: Tensor) -> Tensor:
        return F.linear(seen, weight.dense(), bias)

    return Projection(base, weight, bias, A, B, scale, tiled=True)


def in_fp64(p: Projection) -> Projection:
    tensors = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (p.bias, p.A, p.B)]
    own = DenseWeight("Linear", torch.nn.Parameter(p.weight.dense().double(), requires_grad=False), False)
    return projection_of(own, *tensors, p.scale)  # type: ignore[arg-type]


def gradients_of(projections: list[Projection], x: Tensor, dropped: Any) -> list[Tensor]:
    ys = lora_linears(x, projections, dropped)
    trained = [t for p in projections for t in (p.A, p.B, p.bias) if t is not None and t.requires_grad]
    factors = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) for y in ys]
    loss = sum(((y * factor.to(y.dtype)).sum() for y, factor in zip(ys, factors, strict=True)), x.new_zeros(()))
    return [*ys, *torch.autograd.grad(loss, [x, *trained])]


@pytest.mark.parametrize("kind", [DenseWeight, Passing])
@pytest.mark.parametrize("dropped", [None, halved])
@pytest.mark.parametrize("trained", [None, False, True])
@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_the_step_of_autograd(
    master: torch.dtype,
    scales: tuple[float, float],
    trained: bool | None,
    dropped: Any,
    kind: type[DenseWeight],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bits with the kernel, which is for weights that last and no mask, and without it; fp64's numbers."""
    torch.manual_seed(0)
    x, projections = drawn(120, 64).view(3, 40, 64).requires_grad_(), []
    for out, scale in zip((48, 32), scales, strict=True):
        A, B = ((torch.randn(*shape) / 4).to(master).requires_grad_() for shape in ((8, 64), (out, 8)))
        bias = None if trained is None else drawn(1, out)[0].clone().requires_grad_(trained)
        projections.append(projection_of(weight_of(out, kind), bias, A, B, scale))
    answers: list[bool] = []
    for name in ("adapted_in_tiles", "gradients_in_tiles"):
        real = getattr(linear, name)

        def listened(*told: Any, _real: Any = real, **more: Any) -> Any:
            found = _real(*told, **more)
            answers.append(found is not None)
            return found

        monkeypatch.setattr(linear, name, listened)
    fast = gradients_of(projections, x, dropped)
    assert answers == ([True, True] if dropped is None and kind is DenseWeight else [])
    for name in ("adapted_in_tiles", "gradients_in_tiles"):
        monkeypatch.setattr(linear, name, lambda *_, **__: None)
    slow = gradients_of(projections, x, dropped)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))
    right = gradients_of([in_fp64(p) for p in projections], x.detach().double().requires_grad_(), dropped)
    for mine, exact in zip(fast, right, strict=True):
        assert float((mine.double() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("width", [63, 65, 96, 16])
def test_shapes_that_do_not_fit_reach_no_kernel(width: int) -> None:
    """They would be read past their end."""
    x, one = drawn(40, 64), Adapted(drawn(48, 64), torch.randn(4, 64), torch.randn(48, 4), 1.0, drawn(1, 48)[0])
    wide = drawn(40, width)
    for seen, odd in (
        (wide, one),
        (x, one._replace(weight=drawn(48, width))),
        (x, one._replace(weight=drawn(width, 64))),
        (x, one._replace(A=torch.randn(4, width))),
        (x, one._replace(A=torch.randn(5, 64))),
        (x, one._replace(B=torch.randn(width, 4))),
        (x, one._replace(bias=drawn(1, width)[0])),
    ):
        assert adapted_in_tiles(seen, [odd]) is None
    h, gy, every = drawn(40, 4), drawn(40, 48), [(True, True)]
    assert gradients_in_tiles(x, h, [gy], [one], every, wants_x=True) is not None
    for kept, grad in (
        (drawn(39, 4), gy),
        (drawn(40, 5), gy),
        (drawn(40, 9)[:, :4], gy),
        (h, drawn(39, 48)),
        (h, wide),
    ):
        assert gradients_in_tiles(x, kept, [grad], [one], every, wants_x=True) is None
    with pytest.raises(RuntimeError, match="shapes"):
        lora_linears(wide, [projection_of(weight_of(48), None, one.A, one.B, 1.0)])
