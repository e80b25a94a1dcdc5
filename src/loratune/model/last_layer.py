"""The last decoder layer at scored positions only: what it would give elsewhere nobody reads.

Its keys and values are those of all tokens; what stands behind its attention sees the scored ones alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.lora import put_on, selecting, take_off, wears
from loratune.model.fused import Fused, agree
from loratune.model.modes import evaluating
from loratune.model.self_attention import FusedAttention, trial_inputs
from loratune.quant import frozen_weight

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class FusedLast(Fused):
    """Mixed in before the last layer. Given `scored`, positions of a packed row, it gives (1, scored, features)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        scored, attention = kwargs.get("scored"), cast(FusedAttention, self.self_attn)
        if scored is None:
            return super().forward(hidden_states, *args, **kwargs)
        if args or not attention.takes(kwargs):
            return super().forward(hidden_states, *args, **kwargs).index_select(1, scored)
        x = cast(nn.Module, self.input_layernorm)(hidden_states)
        attended, _ = attention(hidden_states=x, picked=scored, **kwargs)
        mlp = cast(nn.Module, self.mlp)
        with selecting(mlp, scored):
            residual = hidden_states.index_select(1, scored) + attended
            return residual + mlp(cast(nn.Module, self.post_attention_layernorm)(residual))


def fuse_last(model: nn.Module) -> bool:
    """Mix `FusedLast` in where it gives what the model's last layer gives; says whether. Tried on the layer at hand.

    Only above fused attention, and where a layer is these parts and two sums.
    """
    last = _last_layer(model)
    if last is None or last._modules.keys() != _PARTS:
        return False
    if not wears(cast(nn.Module, last.self_attn), FusedAttention.order):
        return False
    if not wears(last, FusedLast.order) and not _tried(last):
        take_off(last, FusedLast.order)
        return False
    return True


def _last_layer(model: nn.Module) -> nn.Module | None:
    """The layer before the head: the last of the decoder's own list, where something else may stand behind it."""
    decoder: Any = getattr(model, "get_decoder", lambda: None)()
    layers = getattr(decoder, "layers", None)
    return layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None


def ends_early(model: nn.Module) -> bool:
    """Whether the last layer takes `scored`."""
    return isinstance(_last_layer(model), FusedLast)


def _tried(layer: nn.Module) -> bool:
    attention = cast(nn.Module, layer.self_attn)
    frozen = frozen_weight(cast(nn.Module, attention.q_proj))
    assert frozen is not None, "the attention above it was tried and found to be fused"
    weight = frozen.dense()
    inputs = trial_inputs(attention, weight)
    scored = torch.tensor([3, 8, 14], device=weight.device)
    try:
        with torch.no_grad(), evaluating(layer):
            stock = layer(**inputs).index_select(1, scored)
            put_on(layer, FusedLast)
            found = layer(**inputs, scored=scored)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        return False
    return agree(found, stock, weight.dtype)
