"""Attention for rows that lie side by side in one packed row: each segment attends to itself alone.

Registered through `transformers`' attention and mask interfaces under one name. A call without segments (generation,
padded batches, other people's code) is passed on to the stock scaled-dot-product attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "loratune_packed"

# Arguments by which some families change the softmax itself; neither path below knows them.
_FOREIGN = ("softcap", "s_aux", "position_bias")


class CannotPackError(Exception):
    """This family's attention needs something that the packed path does not do."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    Args:
        query: (1, heads, tokens, dim); key and value: (1, kv heads, tokens, dim).
        segments: lengths of the segments, in order; their sum is the number of tokens.

    Returns:
        (1, tokens, heads, dim), and no attention weights.
    """
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise CannotPackError(f"its attention uses {', '.join(foreign)}")
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if not getattr(module, "is_causal", True):
        raise CannotPackError("its attention uses no causal mask")
    grouped = query.shape[1] != key.shape[1]
    pieces = []
    for q, k, v in zip(query.split(segments, 2), key.split(segments, 2), value.split(segments, 2), strict=True):
        window = _window_mask(q.shape[2], sliding_window, q.device)
        pieces.append(
            F.scaled_dot_product_attention(
                q, k, v, window, dropout, is_causal=window is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(pieces, 2).transpose(1, 2), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool (length, length) that allows the last `window` tokens; None where a plain causal mask says the same."""
    if window is None or length <= window:
        return None
    age = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (age >= 0) & (age < window)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def packed_inputs(segments: tuple[int, ...]) -> dict[str, Any]:
    """What a forward pass over a packed row takes beside `input_ids` and `position_ids`.

    A ready-made four-dimensional mask keeps the model from building a (tokens × tokens) one; nothing reads it.
    """
    return {"segments": segments, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "use_cache": False}


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch to the attention that packed rows need; calls without segments get the stock one either way."""
    model.set_attn_implementation(NAME)


def why_not_packed(model: PreTrainedModel) -> str | None:
    """None if two packed rows give what they give alone, else the reason; leaves the attention switched on or off.

    Tried on the model at hand rather than looked up by name: some families ignore the attention interface, some mix
    tokens by other means (convolutions, recurrent states), and a leak raises no error.
    """
    try:
        use_packed_attention(model)
    except (ValueError, NotImplementedError, KeyError):
        return "its attention cannot be replaced"
    why = _probe(model)
    if why is not None:
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    return why


@torch.no_grad()
def _probe(model: PreTrainedModel) -> str | None:
    device = next(model.parameters()).device
    embeddings: Any = model.get_input_embeddings()
    vocabulary: int = embeddings.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (1, length), generator=generator).to(device) for length in (7, 5)]
    training = model.training
    model.eval()
    try:
        alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], 1).float()
        positions = torch.cat([torch.arange(row.shape[1], device=device)[None] for row in rows], 1)
        packed = model(
            input_ids=torch.cat(rows, 1), position_ids=positions, **packed_inputs(tuple(row.shape[1] for row in rows))
        ).logits.float()
    except CannotPackError as error:
        return str(error)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"a packed row fails in it ({type(error).__name__})"
    finally:
        model.train(training)
    # Rounding differs with the shapes of the matrix products; a leak changes logits by their own size.
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    deviation = float((packed - alone).norm() / alone.norm())
    return None if deviation <= tolerance else f"packed rows deviate from lone ones by {deviation:.1%}"
