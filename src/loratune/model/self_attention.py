"""The self-attention of the Llama family over packed rows: one step for q, k and v, and a rotary embedding of ours."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.lora import put_on, selecting, take_off, together, wears
from loratune.model.attention import NAME, CannotPackError, packed_attention, packed_inputs
from loratune.model.fused import Fused, agree
from loratune.model.modes import evaluating
from loratune.model.rotary import rotated
from loratune.quant import frozen_weight

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class FusedAttention(Fused):
    """Mixed in before a family's attention; padded rows go the family's way.

    Attributes:
        attention_asks: the scale and the window that the family gives its attention.
    """

    settings = ("attention_asks",)
    head_dim: int
    layer_idx: int
    attention_asks: dict[str, Any]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not self.takes(kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        q, k, v = self._heads(hidden_states)
        cos, sin = (angle.unsqueeze(2) for angle in kwargs["position_embeddings"])
        q, k, v = (x.transpose(1, 2) for x in (rotated(q, cos, sin), rotated(k, cos, sin), v))
        slots = kwargs.get("past_key_values")
        if slots is not None:
            k, v = slots.update(k, v, self.layer_idx)
        told: dict[str, Any] = {name: kwargs.get(name) for name in ("segments", "above", "step")}
        output, _ = packed_attention(self, q, k, v, None, **told, **self.attention_asks)
        o_proj, picked = cast(nn.Module, self.o_proj), kwargs.get("picked")
        if picked is None:
            return o_proj(output.flatten(2)), None
        with selecting(o_proj, picked):  # nobody reads the others
            return o_proj(output.flatten(2).index_select(1, picked)), None

    def takes(self, kwargs: dict[str, Any]) -> bool:
        """Whether these are packed rows or rows that go on, whole heads are turned, and nothing is dropped."""
        angles = kwargs.get("position_embeddings")
        ours = kwargs.get("segments") is not None or kwargs.get("step") is not None
        if not ours or angles is None or torch.compiler.is_compiling():
            return False
        if kwargs.get("past_key_values") is not None and not isinstance(vars(self).get("layer_idx"), int):
            return False
        return bool(angles[0].shape[-1] == self.head_dim) and not (
            self.training and vars(self).get("attention_dropout")
        )

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
    if wears(module, FusedAttention.order):
        return True
    config = getattr(module, "config", None)
    if not module._modules.keys() >= {*_PROJECTIONS, "o_proj"} or getattr(config, "_attn_implementation", None) != NAME:
        return False
    weight = frozen_weight(cast(nn.Module, module.q_proj))
    if weight is None or weight.device.type == "meta":
        return False
    # What clips its heads computes the same only as long as nothing is large enough to be clipped.
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim % 2 or getattr(config, "clip_qkv", None) is not None:
        return False
    fits = _tried(module, weight.dense())
    if not fits:
        take_off(module, FusedAttention.order)
        vars(module).pop("attention_asks", None)
    return fits


def _tried(module: nn.Module, weight: Tensor) -> bool:
    """Whether the module gives the same with `FusedAttention` mixed in, which it then is."""
    asked: dict[str, Any] = {}
    inputs = trial_inputs(module, weight)
    try:
        with torch.no_grad(), evaluating(module):
            stock, _ = module(**inputs, asked=asked)
            if "scaling" not in asked:
                return False
            vars(module)["attention_asks"] = asked
            put_on(module, FusedAttention)
            found, _ = module(**inputs)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, UnboundLocalError, CannotPackError):
        return False
    return agree(found, stock, weight.dtype)


def trial_inputs(module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """Two short packed rows, as an attention module and the layer around it are given them."""
    packed, positions = trial_rows(weight.device)
    tokens, dim = positions.shape[1], cast(int, module.head_dim)
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, weight.shape[1], generator=dice).to(weight.device)
    # So large that the scores spread by about two: else every rotation gives the same mean of all values.
    x = x * (2**0.5 / (x @ weight.float().T).std().clamp(min=1e-3))
    angles = (torch.rand(1, tokens, dim // 2, generator=dice) * 6).repeat(1, 1, 2).to(weight.device)
    turned = (angles.cos().to(weight.dtype), angles.sin().to(weight.dtype))
    return {"hidden_states": x.to(weight.dtype), "position_embeddings": turned, "position_ids": positions, **packed}


def trial_rows(device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """What a model is told of two short packed rows, and their position_ids (1, tokens)."""
    segments = (9, 7)
    positions = torch.cat([torch.arange(length) for length in segments])[None]
    return packed_inputs(segments), positions.to(device)
