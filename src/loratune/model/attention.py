"""Attention for rows that lie side by side in one packed row: each segment attends to itself and what stands above it.

Registered through `transformers`' attention and mask interfaces under one name. A call without segments (generation,
padded batches, other people's code) is passed on to the stock scaled-dot-product attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loratune.kernels import table_of
from loratune.model.flex_attention import block_mask_of, flex_tree_attention, takes
from loratune.model.lane_attention import lane_attention
from loratune.model.lane_attention import takes as takes_lanes
from loratune.model.modes import evaluating
from loratune.model.slot_attention import SlotStep, slot_attention
from loratune.model.tree_attention import plan_of, tree_attention

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
    above: tuple[tuple[int, ...], ...] | None = None,
    step: SlotStep | None = None,
    asked: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, and from it to all of the segments above it.

    Args:
        query: (1, heads, tokens, dim); key and value: (1, kv heads, tokens, dim).
        segments: lengths of the segments, in order; their sum is the number of tokens.
        above: for each segment, those whose tokens come before its own, in order; none without it.
        step: of rows that go on by one token each; these tokens stand before the segments, which may be none.
        asked: here the family's scale and window are noted, for who wants to know them.

    Returns:
        (1, tokens, heads, dim), and no attention weights.
    """
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise CannotPackError(f"its attention uses {', '.join(foreign)}")
    if asked is not None:
        asked.update(scaling=scaling, sliding_window=sliding_window)
    if step is not None:
        continued = slot_attention(query, step, sliding_window, scaling)
        if segments is None:
            return continued, None
        query, key, value = (t[:, :, step.rows :] for t in (query, key, value))
        told: dict[str, Any] = {"sliding_window": sliding_window, "scaling": scaling, "above": above}
        begun, _ = packed_attention(
            module, query, key, value, None, dropout=dropout, segments=segments, **told, **kwargs
        )
        return torch.cat([continued, begun], 1), None
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if not getattr(module, "is_causal", True):
        raise CannotPackError("its attention uses no causal mask")
    # Under autocast a rotation leaves queries and keys in fp32; products in the backward pass refuse two dtypes.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type == "cpu" and dropout == 0.0:
        return _on_a_cpu(query, key, value, segments, above, sliding_window, scaling), None
    if query.device.type == "cuda" and dropout == 0.0:
        mask = block_mask_of(segments, above, sliding_window, query.device)
        if mask is not None and takes(query, key, value, scaling, sliding_window is not None):
            return flex_tree_attention(query, key, value, mask, scaling), None
    return _by_segment(query, key, value, segments, above, sliding_window, dropout, scaling), None


def _on_a_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...],
    above: tuple[tuple[int, ...], ...] | None,
    window: int | None,
    scale: float | None,
) -> Tensor:
    table = table_of(segments, above, window)
    if takes_lanes(query, key, value, table):
        return lane_attention(query[0], key[0], value[0], table, window, scale)[None]
    return tree_attention(query[0], key[0], value[0], plan_of(segments, above, window), scale)[None]


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...],
    above: tuple[tuple[int, ...], ...] | None,
    window: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """The same by torch's own kernel, called once for each segment: on every device, with dropout, in any order."""
    grouped = query.shape[1] != key.shape[1]
    keys, values = key.split(segments, 2), value.split(segments, 2)
    pieces = []
    for i, q in enumerate(query.split(segments, 2)):
        path = (*(above[i] if above else ()), i)
        k, v = (_joined([parts[j] for j in path], q.shape[2], window) for parts in (keys, values))
        mask = _mask(q.shape[2], k.shape[2], window, q.device)
        pieces.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(pieces, 2).transpose(1, 2)


def _joined(parts: Sequence[Tensor], queries: int, window: int | None) -> Tensor:
    """(1, heads, tokens, dim) of a path's segments; what no query's window reaches is left out."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)
    if window is None or len(parts) == 1:
        return whole
    return whole[:, :, max(0, whole.shape[2] - queries - window + 1) :]


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool (queries, keys) that allows each of the last `queries` positions what came up to it, within the window.

    None where a plain causal mask says the same.
    """
    if queries == keys and (window is None or keys <= window):
        return None
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    age = position - torch.arange(keys, device=device)[None, :]
    return (age >= 0) if window is None else (age >= 0) & (age < window)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def packed_inputs(segments: tuple[int, ...], above: tuple[tuple[int, ...], ...] | None = None) -> dict[str, Any]:
    """What a forward pass over a packed row takes beside `input_ids` and `position_ids`.

    A ready-made four-dimensional mask keeps the model from building a (tokens × tokens) one; nothing reads it.
    """
    tree = {} if above is None else {"above": above}
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return {"segments": segments, **tree, "attention_mask": mask, "use_cache": False}


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch to the attention that packed rows need; calls without segments get the stock one either way."""
    model.set_attn_implementation(NAME)


# Whether a model takes packed rows, where that was asked by `packing`.
_TAKES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def packing(model: PreTrainedModel) -> Iterator[bool]:
    """Inside the block the model takes packed rows, if it can: says whether. Its attention is then what it was."""
    before = model.config._attn_implementation
    if model not in _TAKES:
        _TAKES[model] = why_not_packed(model) is None
    elif _TAKES[model]:
        use_packed_attention(model)
    try:
        yield _TAKES[model]
    finally:
        if before is not None and model.config._attn_implementation != before:
            model.set_attn_implementation(before)


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


def why_no_shared_prefixes(model: PreTrainedModel) -> str | None:
    """None if two rows that share a prefix give what they give alone, else the reason; packed rows must work."""
    prefix, first, second = _random_rows(model, 9, 4, 6)
    alone = [torch.cat([prefix, row], 1) for row in (first, second)]
    positions = [torch.arange(9), torch.arange(9, 13), torch.arange(9, 15)]
    # From the rows alone: the prefix and the end of the first, and the end of the second.
    places = [*range(13), *range(13 + 9, 13 + 15)]
    inputs = packed_inputs((9, 4, 6), ((), (0,), (0,)))
    return _deviation(model, alone, places, torch.cat([prefix, first, second], 1), torch.cat(positions)[None], inputs)


def _probe(model: PreTrainedModel) -> str | None:
    rows = _random_rows(model, 7, 5)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    return _deviation(model, rows, range(12), torch.cat(rows, 1), positions, packed_inputs((7, 5)))


def _random_rows(model: PreTrainedModel, *lengths: int) -> list[Tensor]:
    embeddings: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = embeddings.weight.shape[0]
    return [torch.randint(vocabulary, (1, length), generator=generator).to(model.device) for length in lengths]


@torch.no_grad()
def _deviation(
    model: PreTrainedModel,
    alone: Sequence[Tensor],
    places: Sequence[int],
    ids: Tensor,
    positions: Tensor,
    inputs: dict[str, Any],
) -> str | None:
    """Why the logits of one packed pass differ from those at `places` of the rows alone, one after the other."""
    try:
        with evaluating(model):
            rows = torch.cat([model(input_ids=row, use_cache=False).logits for row in alone], 1)
            lone = rows[:, list(places)].float()
            packed = model(input_ids=ids, position_ids=positions.to(ids.device), **inputs).logits.float()
    except CannotPackError as error:
        return str(error)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"a packed row fails in it ({type(error).__name__})"
    # Rounding differs with the shapes of the matrix products; a leak changes logits by their own size.
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    deviation = float((packed - lone).norm() / lone.norm())
    return None if deviation <= tolerance else f"packed rows deviate from lone ones by {deviation:.1%}"
