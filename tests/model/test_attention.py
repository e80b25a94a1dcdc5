"""Packed rows give what they give alone, and a family for which they do not is found before it is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.model import (
    attention,
    has_separate_head,
    packed_inputs,
    use_packed_attention,
    why_no_shared_prefixes,
    why_not_packed,
)
from tests.models import tiny
from tests.training.loops import assert_close

PACKABLE = ["llama", "qwen3", "gemma3", "gpt2", "mixtral"]
LENGTHS = (11, 1, 6, 17)  # longer and shorter than gemma3's window of 4


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 400, (1, length), generator=generator) for length in LENGTHS]


def packed_logits(model: Any, segments: tuple[int, ...] = LENGTHS) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    logits: Tensor = model(input_ids=torch.cat(rows(), 1), position_ids=positions, **packed_inputs(segments)).logits
    return logits


def lone_logits(model: Any) -> Tensor:
    return torch.cat([model(input_ids=row, use_cache=False).logits for row in rows()], 1)


def gradients(model: Any, logits: Tensor) -> list[Tensor]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_rows_are_lone_rows(family: str) -> None:
    stock, packed = tiny(family).requires_grad_(True), tiny(family).requires_grad_(True)
    use_packed_attention(packed)
    expected, found = lone_logits(stock), packed_logits(packed)
    assert_close([found], [expected], rel=1e-5)
    assert_close(gradients(packed, found), gradients(stock, expected), rel=1e-5)


@pytest.mark.parametrize("family", PACKABLE)
def test_a_row_does_not_see_its_neighbours(family: str) -> None:
    model = tiny(family)
    use_packed_attention(model)
    with torch.no_grad():
        before = packed_logits(model)
        ids = torch.cat(rows(), 1)
        ids[0, : LENGTHS[0]] = 5
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        after = model(input_ids=ids, position_ids=positions, **packed_inputs(LENGTHS)).logits
    assert (before[0, : LENGTHS[0]] - after[0, : LENGTHS[0]]).abs().max() > 0.1
    # Experts' products over other groups of tokens round differently; everything else is bit-equal.
    torch.testing.assert_close(after[0, LENGTHS[0] :], before[0, LENGTHS[0] :], rtol=1e-5, atol=1e-5)


def test_sliding_window_is_kept() -> None:
    """A token sees the last four of its row in gemma3's local layers: with a wider window the logits are others."""
    narrow, wide = tiny("gemma3"), tiny("gemma3", sliding_window=64)
    for model in (narrow, wide):
        use_packed_attention(model)
    with torch.no_grad():
        assert_close([packed_logits(narrow)], [lone_logits(tiny("gemma3"))], rel=1e-5)
        assert (packed_logits(narrow) - packed_logits(wide)).abs().max() > 0.01


@pytest.mark.parametrize("before", [0, 1, 6])
@pytest.mark.parametrize(("length", "window"), [(3, None), (4, 4), (5, 4), (9, 2), (9, 1)])
def test_mask_of_a_segment_and_what_stands_above_it(length: int, window: int | None, before: int) -> None:
    mask = attention._mask(length, before + length, window, torch.device("cpu"))
    if before == 0 and (window is None or length <= window):
        assert mask is None
        return
    assert mask is not None
    reach = window or before + length
    for query in range(length):
        allowed = [key for key in range(before + length) if mask[query, key]]
        assert allowed == list(range(max(0, before + query - reach + 1), before + query + 1))


@pytest.mark.parametrize("family", PACKABLE)
def test_stock_calls_are_unchanged(family: str) -> None:
    """Without segments (generation, padded rows, other people's code) the stock kernel runs, bit for bit."""
    stock, ours = tiny(family, attn_implementation="sdpa"), tiny(family)
    use_packed_attention(ours)
    ids = torch.arange(3, 33).view(2, 15)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[0, 9:] = False
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}, {"use_cache": False}):
            assert torch.equal(stock(input_ids=ids, **inputs).logits, ours(input_ids=ids, **inputs).logits)


@pytest.mark.parametrize("family", PACKABLE)
def test_probe_passes(family: str) -> None:
    model = tiny(family).train()
    assert why_not_packed(model) is None
    assert model.config._attn_implementation == attention.NAME
    assert model.training


def test_trials_leave_every_module_in_its_own_mode() -> None:
    """Parts of a model in training may be in evaluation mode, as the base's dropout is."""
    model = tiny("gpt2").train()
    stays = [module.eval() for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert why_not_packed(model) is None
    assert why_no_shared_prefixes(model) is None
    assert has_separate_head(model)
    assert stays
    assert [module for module in model.modules() if not module.training] == stays


def test_probe_in_bf16() -> None:
    assert why_not_packed(tiny().to(torch.bfloat16)) is None


def test_probe_names_a_soft_cap() -> None:
    model = tiny("gemma2")
    assert why_not_packed(model) == "its attention uses softcap"
    # Left as it came, on an attention that works.
    assert model.config._attn_implementation == tiny("gemma2").config._attn_implementation
    assert torch.equal(lone_logits(model), lone_logits(tiny("gemma2")))


@pytest.mark.parametrize("family", PACKABLE)
def test_probe_finds_a_leak(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an attention that takes the packed row for one row."""
    honest = attention.packed_attention

    def leaking(*args: Any, segments: Any = None, **kwargs: Any) -> Any:
        return honest(*args, segments=None if segments is None else (sum(segments),), **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, leaking)
    model = tiny(family)
    why = why_not_packed(model)
    assert why is not None
    assert why.startswith("packed rows deviate from lone ones by")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_finds_a_leak_of_one_token(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the border between two rows is off by one."""
    honest = attention.packed_attention

    def off_by_one(*args: Any, segments: Any = None, **kwargs: Any) -> Any:
        if segments is not None and len(segments) > 1:
            segments = (segments[0] - 1, segments[1] + 1, *segments[2:])
        return honest(*args, segments=segments, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, off_by_one)
    assert why_not_packed(tiny().to(dtype)) is not None


def test_probe_finds_a_model_that_ignores_positions() -> None:
    """Planted: a model that mixes tokens outside its attention, as convolutions and recurrent states do."""
    model = tiny()
    norm = model.model.norm
    norm.register_forward_hook(lambda *call: call[-1] + 0.1 * call[-1].cumsum(1))
    why = why_not_packed(model)
    assert why is not None
    assert "deviate" in why


def test_attention_that_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()

    def refuse(name: str) -> None:
        raise ValueError("this family has its own attention")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    assert why_not_packed(model) == "its attention cannot be replaced"


def test_no_square_mask_is_built() -> None:
    assert packed_inputs((3, 4))["attention_mask"].numel() == 1


@pytest.mark.parametrize("family", PACKABLE)
def test_probe_of_shared_prefixes_passes(family: str) -> None:
    model = tiny(family).train()
    use_packed_attention(model)
    assert why_no_shared_prefixes(model) is None
    assert model.training


@pytest.mark.parametrize("fault", ["unseen", "one token short", "the other branch"])
def test_probe_of_shared_prefixes_finds_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a branch does not see its prefix, sees it without its last token, or sees its neighbour too."""
    honest = attention.packed_attention

    def faulty(*args: Any, segments: Any = None, above: Any = None, **kwargs: Any) -> Any:
        if above is not None:
            length = segments[0]
            segments, above = {
                "unseen": (segments, None),
                "one token short": ((length - 1, 1, *segments[1:]), ((), (0,), (0,), (0,))),
                "the other branch": (segments, ((), (0,), (0, 1))),
            }[fault]
        return honest(*args, segments=segments, above=above, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, faulty)
    model = tiny()
    use_packed_attention(model)
    why = why_no_shared_prefixes(model)
    assert why is not None
    assert why.startswith("packed rows deviate from lone ones by")
