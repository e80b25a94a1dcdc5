"""The self-attention of the Llama family over packed rows: one step for q, k and v, and a rotary embedding of ours."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.lora import put_on, take_off, together
from loratune.model.attention import NAME, CannotPackError, packed_attention, packed_inputs
from loratune.model.fused import Fused, deviation, is_near
from loratune.model.rotary import rotated

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class FusedAttention(Fused):
    """Mixed in before a family's attention; a call without segments (generation, padded rows) goes the family's way.

    Attributes:
        attention_asks: the scale and the window that the family gives its attention.
    """

    settings = ("attention_asks",)
    head_dim: int
    attention_asks: dict[str, Any]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        turned, segments = kwargs.get("position_embeddings"), kwargs.get("segments")
        drops = self.training and vars(self).get("attention_dropout")
        if args or segments is None or turned is None or drops or torch.compiler.is_compiling():
            return super().forward(hidden_states, *args, **kwargs)
        q, k, v = self._heads(hidden_states)
        cos, sin = (angle.unsqueeze(2) for angle in turned)
        turned_q, turned_k = (rotated(x, cos, sin).transpose(1, 2) for x in (q, k))
        told = {"segments": segments, "above": kwargs.get("above"), **self.attention_asks}
        output, _ = packed_attention(self, turned_q, turned_k, v.transpose(1, 2), None, **told)
        return cast(nn.Module, self.o_proj)(output.flatten(2)), None

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (1, tokens, heads, dim), normed where the family norms heads."""
        found = together([cast(nn.Module, self._modules[name]) for name in _PROJECTIONS], x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in found)
        q_norm, k_norm = self._modules.get("q_norm"), self._modules.get("k_norm")
        return q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k), v


def fuse_attention(module: nn.Module) -> bool:
    """Mix `FusedAttention` in where it gives what the module gives; says whether. Tried on the module at hand.

    Only where the module takes packed rows already: nothing would be gained elsewhere.
    """
    config = getattr(module, "config", None)
    if not module._modules.keys() >= {*_PROJECTIONS, "o_proj"} or getattr(config, "_attn_implementation", None) != NAME:
        return False
    weight = cast(nn.Module, module.q_proj).weight
    if not isinstance(weight, Tensor) or weight.is_meta or not isinstance(getattr(module, "head_dim", None), int):
        return False
    asked: dict[str, Any] = {}
    inputs = _inputs(module, weight)
    training, module.training = module.training, False
    try:
        with torch.no_grad():
            stock = module(**inputs, asked=asked)[0]
            vars(module)["attention_asks"] = asked
            put_on(module, FusedAttention)
            found = module(**inputs)[0]
        fits = is_near(deviation(found, stock), weight.dtype)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, CannotPackError):
        fits = False
    finally:
        module.training = training
    if not fits:
        take_off(module, FusedAttention.order)
        vars(module).pop("attention_asks", None)
    return fits


def _inputs(module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """Two short packed rows for one attention module."""
    segments, dim = (5, 4), cast(int, module.head_dim)
    x = torch.linspace(-2, 2, 9 * weight.shape[1], device=weight.device).sin().view(1, 9, -1)
    angles = torch.linspace(0, 3, 9 * dim // 2, device=weight.device).view(1, 9, -1).repeat(1, 1, 2)
    turned = (angles.cos().to(weight.dtype), angles.sin().to(weight.dtype))
    return {"hidden_states": x.to(weight.dtype), "position_embeddings": turned, **packed_inputs(segments)}
