"""The last layer at scored positions only: the same loss, gradients and dropout masks, with less computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import loratune as lt
from loratune.data.batch import make_batch, tree_of
from loratune.lora import TokenCounter, take_off
from loratune.loss import summed_loss
from loratune.model import adapter_training, fuse, hidden_at, packed_inputs, unfuse, use_packed_attention
from loratune.model.last_layer import FusedLast, ends_early, fuse_last
from tests.models import PAD, branching_rows, rows_of, tiny
from tests.training.loops import assert_close

ROWS = rows_of(9, 14, 2, 11, 20)


def attached(family: str, dropout: float = 0.0) -> tuple[Any, lt.Adapters]:
    model = tiny(family)
    use_packed_attention(model)
    handle = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    fuse(model)
    return model, handle


def last(model: Any) -> nn.Module:
    layer: nn.Module = model.model.layers[-1]
    return layer


def step(model: Any, handle: lt.Adapters, batch: Any) -> tuple[float, list[torch.Tensor]]:
    with handle.counting(TokenCounter(0, 3, batch.tokens)):
        loss = summed_loss(model, batch)
        loss.backward()
    found = [p.grad.clone() for p in handle.parameters()]
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "mixtral"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_gradients_and_masks_are_those_of_the_whole_layer(family: str, shared: bool, dropout: float) -> None:
    model, handle = attached(family, dropout)
    adapter_training(model)
    rows = branching_rows() if shared else ROWS
    batch = make_batch(rows, packed=True, pad_id=PAD, tree=tree_of(rows) if shared else None)
    assert ends_early(model)
    loss, gradients = step(model, handle, batch)
    take_off(last(model), FusedLast.order)
    whole, stock = step(model, handle, batch)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert_close(gradients, stock, rel=1e-5)


def test_what_stands_behind_the_last_attention_sees_scored_positions_only() -> None:
    model, _ = attached("llama")
    seen: dict[str, int] = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm"):
        module = last(model).get_submodule(name)
        module.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].shape[1]}))
    batch = make_batch(ROWS, packed=True, pad_id=PAD)
    summed_loss(model, batch)
    assert len(batch.scored) < batch.computed_tokens
    assert seen.pop("self_attn.q_proj") == batch.computed_tokens
    assert set(seen.values()) == {len(batch.scored)}


def test_a_call_that_scores_nothing_is_the_stock_one() -> None:
    model, _ = attached("llama")
    ids = torch.randint(400, (1, 12))
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = model(input_ids=ids, position_ids=positions, **packed_inputs((7, 5))).logits
    padded = hidden_at(model, torch.tensor([2, 7]), {"input_ids": ids, "use_cache": False})
    take_off(last(model), FusedLast.order)
    assert torch.equal(packed, model(input_ids=ids, position_ids=positions, **packed_inputs((7, 5))).logits)
    assert torch.equal(padded, hidden_at(model, torch.tensor([2, 7]), {"input_ids": ids, "use_cache": False}))


def test_where_attention_goes_the_familys_way_the_layer_does_too() -> None:
    """Attention that drops probabilities is not computed by the fused one."""
    model, handle = attached("llama")
    last(model).self_attn.attention_dropout = 0.5
    batch = make_batch(ROWS, packed=True, pad_id=PAD)
    adapter_training(model)
    loss, _ = step(model, handle, batch)
    last(model).self_attn.training = True
    torch.manual_seed(0)
    dropped, _ = step(model, handle, batch)
    assert dropped != pytest.approx(loss, rel=1e-3)


def test_a_layer_of_another_formula_is_left_alone() -> None:
    model = tiny("llama")
    use_packed_attention(model)
    layer = last(model)

    class Scaled(type(layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * 1.01

    layer.__class__ = Scaled
    fuse(model)
    assert not ends_early(model)
    assert not fuse_last(model)
    assert type(layer) is Scaled


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "phi3"])
def test_families_without_such_a_layer(family: str) -> None:
    model, _ = attached(family)
    assert not ends_early(model)


def test_unfused() -> None:
    model, _ = attached("llama")
    unfuse(model)
    assert not ends_early(model)


def test_it_is_the_decoders_last_layer_whatever_stands_behind_it() -> None:
    model = tiny("llama")
    use_packed_attention(model)
    model.draft = tiny("llama", seed=1).model.layers[0]  # a head that guesses ahead, say
    fuse(model)
    assert isinstance(last(model), FusedLast)
    assert not isinstance(model.draft, FusedLast)
