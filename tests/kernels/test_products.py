"""Sums of products, and products over rows: by a processor's matrix unit and by torch, against fp64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.kernels import c_blocks, has_tiles, product_over_rows, products, sum_of_products

in_tiles = pytest.mark.skipif(not c_blocks.TILES, reason="the processor has no matrix unit")
WAYS = [pytest.param(True, marks=in_tiles), False]


def drawn(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, *, among: int = 0) -> Tensor:
    """Rows that are contiguous, `among` other columns."""
    return torch.randn(rows, columns + 2 * among).to(dtype)[:, among : among + columns]


def by_columns(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, *, among: int = 0) -> Tensor:
    return drawn(columns, rows, dtype, among=among).T


@pytest.fixture(params=WAYS, ids=["tiles", "torch"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(c_blocks, "TILES", request.param)
    return bool(request.param)


def exact(pairs: list[tuple[Tensor, Tensor]], scale: float, into: Tensor | None) -> Tensor:
    total = scale * sum((x.double() @ w.double() for x, w in pairs), torch.zeros((), dtype=torch.float64))
    return total if into is None else total + into.double()


@pytest.mark.parametrize("seed", range(40))
def test_a_sum_of_any_sizes(seed: int, tiles: bool) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    rows, columns = draw.choice([32, 33, 47, 64, 200, 301]), draw.choice([1, 15, 16, 17, 31, 33, 64, 130])
    pairs = []
    for _ in range(draw.randint(1, 4)):
        inner, lie = draw.choice([1, 8, 16, 31, 32, 33, 63, 65, 200]), draw.choice([drawn, by_columns])
        pairs.append((drawn(rows, inner, among=draw.choice([0, 3])), lie(inner, columns, among=draw.choice([0, 5]))))
    into = draw.choice([None, drawn(rows, columns, among=1)])
    scale = draw.choice([1.0, 0.3])
    right = exact(pairs, scale, into)
    around = None if into is None else into._base
    kept = None if around is None else around[:, [0, -1]].clone()
    found = sum_of_products(pairs, scale, into)
    assert (found is into) == (into is not None)
    # Rounded once in tiles, to half a unit in the last place; by torch for each product, and for the scale.
    roundings = 1 if tiles else 2 * len(pairs) + 1
    size = float(right.abs().max())
    assert float((found.double() - right).abs().max()) <= roundings * size * 2**-8
    if tiles:
        assert torch.equal(found, right.float().bfloat16()) or _near_halves(found, right)
    if around is not None:
        assert torch.equal(around[:, [0, -1]], kept)


@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1020, 1536, 576), (700, 576, 1536), (301, 192, 24), (320, 1536, 16), (33, 64, 32), (64, 4096, 40)],
)
@pytest.mark.parametrize("lie", [drawn, by_columns])
def test_a_product_of_a_models_size(rows: int, inner: int, columns: int, lie: Any, tiles: bool) -> None:
    """More tiles than are there at once; left factors that are read where they lie, and (64, 4096) that are not."""
    torch.manual_seed(0)
    x, w = drawn(rows, inner), lie(inner, columns)
    right = exact([(x, w)], 1.0, None)
    found = sum_of_products([(x, w)])
    assert _near_halves(found, right) if tiles else float((found - right).abs().max()) < 1


@pytest.mark.parametrize("rows", [64, 77, 110])
@pytest.mark.parametrize("inner", [(576, 16), (640, 40), (992, 8, 992), (1024, 16), (1536, 1536, 32), (2048, 192)])
def test_several_long_sums(rows: int, inner: tuple[int, ...], tiles: bool) -> None:
    """Gone through in parts of several factors; rows 2 KB apart are put into tiles, and those that fill none."""
    torch.manual_seed(rows)
    pairs = [
        (drawn(rows, width), draw(width, 200)) for width, draw in zip(inner, [drawn, by_columns] * 2, strict=False)
    ]
    right = exact(pairs, 0.5, None)
    found = sum_of_products(pairs, 0.5)
    assert _near_halves(found, right) if tiles else float((found - right).abs().max()) < 2


@pytest.mark.parametrize("width", [16, 48, 70])
def test_what_stands_beside_a_factor_is_not_read(width: int) -> None:
    """Rows of 96 words, aligned as tiles are, of which a factor has the first ones."""
    torch.manual_seed(0)
    around = torch.full((64, 96), torch.nan, dtype=torch.bfloat16)
    x, w = around[:, :width], drawn(width, 40)
    x.copy_(drawn(64, width))
    right = exact([(x, w)], 1.0, None)
    assert float((sum_of_products([(x, w)]).double() - right).abs().max()) <= float(right.abs().max()) * 2**-7


@in_tiles
def test_right_factors_that_do_not_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LONGEST", 20_000)
    x, w = drawn(40, 20_000), by_columns(20_000, 1_100)
    assert has_tiles([(x, w)])
    assert _near_halves(sum_of_products([(x, w)]), exact([(x, w)], 1.0, None))


@pytest.mark.parametrize(
    ("inner", "sums"),
    [([6144], [[6144]]), ([6145], []), ([3072, 3072, 32], [[3072, 3072], [32]]), ([16, 6145, 16], [[16], [16]])],
)
def test_longer_sums_are_several_or_torchs(
    inner: list[int], sums: list[list[int]], tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products together where they are short enough, one too long for tiles by torch; in their order."""
    asked: list[list[int]] = []
    real = c_blocks.sum_of_products

    def listened(pairs: Any, *rest: Any) -> Tensor:
        asked.append([x.shape[1] for x, _ in pairs])
        return real(pairs, *rest)

    monkeypatch.setattr(c_blocks, "sum_of_products", listened)
    pairs = [(drawn(40, width), drawn(width, 8)) for width in inner]
    assert has_tiles(pairs) == (tiles and sum(inner) <= 6144)
    assert float((sum_of_products(pairs) - exact(pairs, 1.0, None)).abs().max()) < 4
    assert asked == (sums if tiles else [])


def _near_halves(found: Tensor, right: Tensor) -> bool:
    """What is not the nearest bf16 is as near as fp32 can tell."""
    away, best = (found.double() - right).abs(), (right.float().bfloat16().double() - right).abs()
    return bool((away <= best + 1e-5 * right.abs().max()).all())


@pytest.mark.parametrize("rows", [32, 33, 255, 256, 257, 600])
@pytest.mark.parametrize("sides", [(16, 576), (576, 16), (1, 1), (33, 47), (130, 3), (700, 48)])
def test_over_rows(rows: int, sides: tuple[int, int], tiles: bool) -> None:
    torch.manual_seed(rows)
    u, v = drawn(rows, sides[0], among=2), drawn(rows, sides[1], among=1)
    right = u.double().T @ v.double()
    found = product_over_rows(u, v)
    assert found.shape == sides
    assert found.dtype == (torch.float32 if tiles else torch.bfloat16)
    torch.testing.assert_close(
        found.double(), right, rtol=1e-5 if tiles else 1e-2, atol=(1e-5 if tiles else 1e-2) * rows
    )


@in_tiles
def test_threads_change_no_bit() -> None:
    x, w, z, turned = drawn(301, 192), drawn(192, 90), drawn(301, 40), by_columns(40, 90)
    thin, wide, deep = drawn(192, 24), drawn(1020, 1536), drawn(1536, 576)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            sums = [[(x, w), (z, turned)], [(x, thin)], [(wide, deep)]]
            results.append((*(sum_of_products(products) for products in sums), product_over_rows(x, z)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for pair in results[1:] for a, b in zip(results[0], pair, strict=True))


@in_tiles
def test_what_is_no_number_stays_in_its_row() -> None:
    x, w = drawn(40, 50), drawn(50, 20)
    x[3, 7] = torch.nan
    x[5, 8] = torch.inf
    found = sum_of_products([(x, w)])
    assert found[3].isnan().all()
    assert not found[5].isfinite().any()
    assert found[[0, 1, 2, 4, *range(6, 40)]].isfinite().all()


@in_tiles
@pytest.mark.parametrize(
    "pair",
    [
        (drawn(31, 8), drawn(8, 8)),  # so few rows
        (drawn(40, 8, torch.float32), drawn(8, 8, torch.float32)),
        (drawn(8, 40).T, drawn(8, 8)),  # rows that are not contiguous
        (drawn(40, 8), drawn(16, 16)[::2, ::2]),
        (drawn(1, 8).expand(40, 8)[:, :1].expand(40, 8), drawn(8, 8)),
        (drawn(40, 8), drawn(8, 8).requires_grad_()),  # which autograd must hear of
    ],
)
def test_what_torch_computes(pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Tensor:
        raise AssertionError("not for these")

    monkeypatch.setattr(c_blocks, "sum_of_products", refused)
    assert torch.equal(sum_of_products([pair]), torch.mm(*pair))
    with pytest.raises(AssertionError, match="not for these"):
        sum_of_products([(drawn(40, 8), drawn(8, 8))])


@in_tiles
def test_no_memory_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what training on less at once is for."""
    monkeypatch.setattr(c_blocks._library, "sum_of_products", lambda *_: 1)
    monkeypatch.setattr(c_blocks._library, "product_over_rows", lambda *_: 1)
    for compute in (
        lambda: sum_of_products([(drawn(40, 8), drawn(8, 8))]),
        lambda: product_over_rows(*[drawn(40, 8)] * 2),
    ):
        with pytest.raises(MemoryError):
            compute()


@pytest.mark.parametrize(
    "compute",
    [
        lambda: sum_of_products([(drawn(64, 100), drawn(64, 8))]),
        lambda: sum_of_products([(drawn(64, 8), drawn(8, 8)), (drawn(65, 8), drawn(8, 8))]),
        lambda: sum_of_products([(drawn(64, 8), drawn(8, 8))], into=drawn(65, 8)),
        lambda: sum_of_products([(drawn(64, 8), drawn(8, 8))], into=drawn(1, 8).expand(64, 8)),
        lambda: product_over_rows(drawn(64, 8), drawn(65, 8)),
    ],
)
def test_what_does_not_fit_is_refused(compute: Any, tiles: bool) -> None:
    with pytest.raises(RuntimeError):
        compute()


def test_what_is_elsewhere_has_no_tiles() -> None:
    assert not has_tiles([(drawn(64, 8), drawn(8, 8).to("meta"))])
    assert has_tiles([(drawn(64, 8), drawn(8, 8))]) == c_blocks.TILES


def test_autograd_sees_that_something_was_added_to() -> None:
    into = drawn(40, 8)
    before = into._version
    sum_of_products([(drawn(40, 8), drawn(8, 8))], into=into)
    assert into._version > before


def test_where_there_are_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the kernels are Triton's."""
    pytest.importorskip("triton")
    from loratune.kernels import triton_blocks

    monkeypatch.setattr(products, "kernels_for", lambda _: triton_blocks)
    x, w = drawn(40, 8), drawn(8, 8)
    assert torch.equal(sum_of_products([(x, w)]), torch.mm(x, w))


def test_nothing_of_no_rows() -> None:
    assert sum_of_products([(drawn(0, 8), drawn(8, 4))]).shape == (0, 4)
    assert products.product_over_rows(drawn(0, 8), drawn(0, 4)).shape == (8, 4)
