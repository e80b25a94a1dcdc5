"""Attention by blocks over a tree, against a dense masked softmax, and the blocks against visibility pair by pair."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from loratune.model import attention
from loratune.model import flex_attention as flex
from loratune.model.flex_attention import block_mask_of, flex_tree_attention
from tests.oracle.attention import Above, dense, trees, visibility

CPU = torch.device("cpu")
WINDOWS = st.sampled_from([None, 1, 3, 7])
# Several blocks of 128, none of whose borders is a segment's; the last block is no whole one.
LONG = ((150, 140, 30, 60, 8), ((), (0,), (0,), (), (3,)))

Tree = tuple[tuple[int, ...], Above]


def mask_of(segments: tuple[int, ...], above: Above | None, window: int | None) -> BlockMask:
    mask = block_mask_of(segments, above, window, CPU)
    assert mask is not None
    return mask


def tensors(tokens: int, dim: int = 8, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries of six heads, keys and values of two, (1, heads, tokens, dim), in memory token by token."""
    torch.manual_seed(tokens)
    return [torch.randn(1, tokens, n, dim).to(device, dtype).transpose(1, 2) for n in (6, 2, 2)]


def pairs_of(mask: BlockMask, tokens: int) -> Tensor:
    """Bool (tokens, tokens): what the mask's function says of each pair."""
    number = torch.arange(tokens)
    zero = torch.tensor(0)
    return mask.mask_mod(zero, zero, number[:, None], number).expand(tokens, tokens)


def blocks_of(mask: BlockMask, *, full: bool) -> Tensor:
    """Bool (blocks, blocks): the partial or the full ones, read from the lists of keys for each query."""
    number, listed = (mask.full_kv_num_blocks, mask.full_kv_indices) if full else (mask.kv_num_blocks, mask.kv_indices)
    assert number is not None
    assert listed is not None
    found = torch.zeros(listed.shape[-2:], dtype=torch.bool)
    for row, (n, columns) in enumerate(zip(number[0, 0].tolist(), listed[0, 0].tolist(), strict=True)):
        found[row, columns[:n]] = True
    return found


@settings(max_examples=100, deadline=None)
@given(trees(), WINDOWS)
def test_the_masks_function_is_visibility(tree: Tree, window: int | None) -> None:
    seen = visibility(*tree, window)
    assert torch.equal(pairs_of(mask_of(*tree, window), len(seen)), seen)


@settings(max_examples=200, deadline=None)
@given(trees(), WINDOWS, st.sampled_from([2, 3, 4, 64]))
def test_blocks_are_those_that_hold_something_and_everything(tree: Tree, window: int | None, size: int) -> None:
    seen, tokens = visibility(*tree, window), sum(tree[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_BLOCK", size)
        block_mask_of.cache_clear()
        mask = mask_of(*tree, window)
        block_mask_of.cache_clear()
    partial, full = blocks_of(mask, full=False), blocks_of(mask, full=True)
    edge = len(partial) * size
    padded = torch.zeros(edge, edge, dtype=torch.bool)
    padded[:tokens, :tokens] = seen
    by_block = padded.view(-1, size, len(partial), size).transpose(1, 2).flatten(2)
    assert torch.equal(full, by_block.all(-1))
    something = by_block.any(-1)
    assert not (something & ~(partial | full)).any()
    assert not (partial & full).any()
    if window is None:
        assert torch.equal(partial | full, something)
    assert mask.q_indices is not None
    assert mask.shape == (1, 1, tokens, tokens)


@settings(max_examples=100, deadline=None)
@given(trees(), WINDOWS, st.sampled_from([None, 0.3]))
def test_output_is_that_of_the_dense_formula(tree: Tree, window: int | None, scale: float | None) -> None:
    q, k, v = tensors(sum(tree[0]))
    found = flex_tree_attention(q, k, v, mask_of(*tree, window), scale)
    wide = [t[0].double() for t in (q, k, v)]
    wide[0] = wide[0] * (1 if scale is None else scale * 8**0.5)
    expected = dense(*wide, *tree, window)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_variants_do_not_count_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo keeps eight of a function and refuses a ninth: dims, windows, modes, and which of three are trained."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled(function, backend="eager", **how))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # no gradients on a CPU
    flex._compiled.cache_clear()
    ways = [
        (dim, window, wanted, mode)
        for dim, window in ((16, None), (24, None), (16, 3))
        for wanted in itertools.product((False, True), repeat=2)
        for mode in (torch.no_grad, torch.inference_mode)
    ]
    for dim, window, wanted, mode in ways:
        q, k, v = tensors(8, dim)
        q.requires_grad_(wanted[0]), v.requires_grad_(wanted[1])
        mask = mask_of((5, 3), None, window)
        with mode():
            attend = flex._compiled(flex._variant_of(q, k, v, mask))
            assert attend(q, k, v, block_mask=mask, enable_gqa=True, kernel_options={}).shape == (1, 6, 8, dim)
    assert flex._compiled.cache_info().currsize == len(ways)
    flex._compiled.cache_clear()
    torch._dynamo.reset()  # what it learned of sizes here goes into the names of the next kernel's numbers


@pytest.mark.parametrize("window", [None, 100])
def test_compiled_kernel_goes_by_the_blocks(window: int | None) -> None:
    """Run without compiling, flex reads the mask's function only; the compiled kernel visits the blocks listed."""
    for segments, above in (LONG, ((70,), ((),)), ((128, 128), ((), ())), ((40, 50), ((), (0,)))):
        q, k, v = tensors(sum(segments), 16)
        with torch.no_grad():
            mask = mask_of(segments, above, window)
            attend = flex._compiled(flex._variant_of(q, k, v, mask))
            found = attend(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=flex._OPTIONS)
        expected = dense(q[0], k[0], v[0], segments, above, window)
        torch.testing.assert_close(found[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("window", [None, 512])
def test_nothing_of_the_size_of_tokens_squared_is_made(window: int | None) -> None:
    segments, above = (3000, 1000, 1200, 3000), ((), (0,), (0,), ())
    block_mask_of.cache_clear()
    with Largest() as largest:
        mask_of(segments, above, window)
    assert 0 < largest.numel <= 2 * sum(segments)


def test_mask_is_made_once_for_all_layers() -> None:
    assert mask_of((5, 3), ((), (0,)), None) is mask_of((5, 3), ((), (0,)), None)


def test_mask_made_while_evaluating_can_be_trained_with() -> None:
    block_mask_of.cache_clear()
    with torch.inference_mode():
        mask = mask_of((5, 3), ((), (0,)), 2)
    captured = [cell.cell_contents for cell in mask.mask_mod.__closure__ or ()]
    assert len(captured) == 3
    assert not any(t.is_inference() for t in (mask.kv_indices, mask.full_q_indices, *captured))


@pytest.mark.parametrize("above", [((), (), (0,)), ((), (0,), (1,)), ((), (0,), (), (0,))])
def test_a_tree_in_another_order_has_no_blocks(above: Above) -> None:
    assert block_mask_of((3,) * len(above), above, None, CPU) is None


@settings(max_examples=50, deadline=None)
@given(trees(), WINDOWS)
def test_segment_by_segment_is_the_same(tree: Tree, window: int | None) -> None:
    """What other devices run, and this one where flex attention does not take it."""
    inputs = [t.double().requires_grad_() for t in tensors(sum(tree[0]))]
    found = attention._by_segment(*inputs, *tree, window, 0.0, None)[0]
    expected = dense(*(t[0] for t in inputs), *tree, window)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


Attend = Callable[..., Tensor]


def by_function(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, **kwargs: Any) -> Tensor:
    """In the place of torch's kernel, with gradients on a CPU: scaled dot product under the mask written out."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, pairs_of(block_mask, q.shape[2]), scale=kwargs["scale"], enable_gqa=kwargs["enable_gqa"]
    )


def leaking(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def wrong_backward(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    return by_function(q, k, v.detach() + 1.2 * (v - v.detach()), **kwargs)


def unscaled(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    return by_function(q, k, v, **{**kwargs, "scale": None})


def nan(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    return by_function(q, k, v, **kwargs) * torch.nan


def nan_backward(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    v = v.clone()
    if v.requires_grad:
        v.register_hook(lambda grad: grad * torch.nan)
    return by_function(q, k, v, **kwargs)


def failing(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError("Failed to find C compiler.\nSet CC.")


@pytest.fixture
def compilable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex, "triton_available", lambda _: True)
    flex._works.cache_clear()
    yield
    flex._works.cache_clear()


@pytest.mark.parametrize(
    ("attend", "says"),
    [
        (by_function, None),
        (leaking, "deviates"),
        (wrong_backward, "deviates"),
        (unscaled, "deviates"),
        (nan, "deviates"),
        (nan_backward, "deviates"),
        (failing, "RuntimeError: Failed to find C compiler.)"),
    ],
)
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.usefixtures("compilable")
def test_a_kernel_is_tried_before_it_is_used(
    attend: Attend, says: str | None, windowed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted: kernels that cannot be compiled, leak, scale otherwise, give NaN, or fail in the backward pass."""
    monkeypatch.setattr(flex, "flex_attention", attend)
    inputs = tensors(4, 16)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "loratune"), torch.inference_mode():
        for _ in range(2):
            assert flex.takes(*inputs, 0.3, windowed) == (says is None)
    assert torch.equal(before, torch.get_rng_state())
    # Once for each kind, however many layers ask.
    assert len(caplog.messages) == (says is not None)
    assert all(says in message for message in caplog.messages if says)


@pytest.mark.usefixtures("compilable")
def test_the_trial_is_none_of_what_the_caller_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputation counts what is kept, and asks again later, when nothing is tried any more."""
    monkeypatch.setattr(flex, "flex_attention", by_function)
    inputs, kept = tensors(4, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert flex.takes(*inputs, None, windowed=False)
    assert not kept


@pytest.mark.usefixtures("compilable")
def test_what_the_kernel_cannot_take_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "flex_attention", by_function)
    q, k, v = tensors(4, 16)
    assert flex.takes(q, k, v, None, windowed=False)
    assert not flex.takes(*tensors(4, 8), None, windowed=False)
    assert not flex.takes(*tensors(4, 512), None, windowed=False)
    assert not flex.takes(q.double(), k.double(), v.double(), None, windowed=False)
    assert not flex.takes(q.half(), k, v, None, windowed=False)


def test_a_cpu_has_no_kernel() -> None:
    flex._works.cache_clear()
    assert not flex.takes(*tensors(4, 16), None, windowed=False)


@pytest.mark.parametrize(
    ("device", "dropout", "above", "takes", "way"),
    [
        ("cuda", 0.0, ((), (0,)), True, "flex"),
        ("cuda", 0.0, None, True, "flex"),
        ("cuda", 0.0, ((), (0,)), False, "segments"),
        ("cuda", 0.1, ((), (0,)), True, "segments"),
        ("cuda", 0.0, ((), (), (0,)), True, "segments"),
        ("mps", 0.0, ((), (0,)), True, "segments"),
    ],
)
def test_which_way_attention_goes(
    device: str, dropout: float, above: Above | None, takes: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "block_mask_of", lambda *args: block_mask_of(*args[:3], CPU))
    monkeypatch.setattr(attention, "takes", lambda *_: takes)
    monkeypatch.setattr(attention, "flex_tree_attention", lambda *_: "flex")
    monkeypatch.setattr(attention, "_by_segment", lambda *_: "segments")
    tensor: Any = SimpleNamespace(device=torch.device(device), dtype=torch.float32, to=lambda _: tensor)
    segments = (3,) * (2 if above is None else len(above))
    found, _ = attention.packed_attention(
        torch.nn.Module(), tensor, tensor, tensor, None, dropout=dropout, segments=segments, above=above
    )
    assert found == way


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("tree", [LONG, ((70,), ((),)), ((128, 128), ((), ())), ((40, 50), ((), (0,)))])
def test_on_a_gpu(tree: Tree, window: int | None) -> None:
    """The compiled kernel in bf16 is as near to the exact result as the plain formula in bf16, gradients included."""
    device, tokens = torch.device("cuda"), sum(tree[0])
    low = [t.requires_grad_() for t in tensors(tokens, 64, device, torch.bfloat16)]
    high = [t.detach().double().requires_grad_() for t in low]
    assert flex.takes(*low, None, window is not None)
    found, _ = attention.packed_attention(
        torch.nn.Module(), *low, None, segments=tree[0], above=tree[1], sliding_window=window
    )
    plain, right = (dense(*(t[0] for t in inputs), *tree, window)[None] for inputs in (low, high))
    grad = torch.randn_like(right)
    results = [
        (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))
        for out, inputs in ((found, low), (plain, low), (right, high))
    ]
    for mine, eager, exact in zip(*results, strict=True):
        assert (mine - exact).norm() <= 1.2 * (eager - exact).norm()
