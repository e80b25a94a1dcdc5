"""Logits at chosen positions are those that the whole forward pass gives there."""

from __future__ import annotations

import pytest
import torch

from loratune.model import only_positions
from tests.models import FAMILIES, tiny

IDS = torch.arange(3, 45).view(2, 21)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_slicing(family: str) -> None:
    model = tiny(family)
    index = torch.tensor([0, 3, 4, 20, 21, 30, 41])
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        with only_positions(model, index):
            some = model(input_ids=IDS, use_cache=False).logits
    assert some.shape == (1, 7, 400)
    torch.testing.assert_close(some[0], whole.view(-1, 400)[index], rtol=1e-5, atol=1e-5)


def test_soft_cap_of_the_logits_still_applies() -> None:
    """Gemma 2 caps its logits after the head: a selection that bypassed `forward` would miss it."""
    model = tiny("gemma2", final_logit_softcapping=0.5)
    with torch.no_grad(), only_positions(model, torch.tensor([1, 7])):
        some = model(input_ids=IDS, use_cache=False).logits
    assert some.abs().max() <= 0.5
    uncapped = tiny("gemma2", final_logit_softcapping=None)
    with torch.no_grad(), only_positions(uncapped, torch.tensor([1, 7])):
        raw = uncapped(input_ids=IDS, use_cache=False).logits
    assert raw.abs().max() > 0.5
    torch.testing.assert_close(some, 0.5 * torch.tanh(raw / 0.5), rtol=1e-5, atol=1e-5)


def test_hook_goes_also_after_an_error() -> None:
    model = tiny()
    with pytest.raises(IndexError), only_positions(model, torch.tensor([10_000])):
        model(input_ids=IDS)
    assert not model.lm_head._forward_pre_hooks
