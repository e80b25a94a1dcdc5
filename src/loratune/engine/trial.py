"""Whether rows of a model can be continued together, and how much of them memory holds."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.adapt import Mixed
from loratune.engine.passes import Passes
from loratune.engine.slots import Slots
from loratune.model import CannotPackError, available_memory, evaluating, fused

# Prompts of the trial's rows, and how many tokens each goes on by; the last row begins beside the others' first step.
_PROMPTS, _STEPS = (5, 3, 4), (2, 2, 1)
# What the passes themselves need stays free.
_MEMORY_SHARE = 0.8


class _Passed(NamedTuple):
    dtype: torch.dtype
    fused: bool
    bytes_per_place: int


# Models that gave in the trial what they give alone.
_PASSED: WeakKeyDictionary[nn.Module, _Passed] = WeakKeyDictionary()


def why_not_batched(model: PreTrainedModel, longest: int) -> str | None:
    """None if rows of up to `longest` tokens, continued together, give what they give alone; else the reason.

    The model must take packed rows (`why_not_packed`), which says nothing of what follows them: some families keep
    keys and values their own way. Tried on the model at hand, once where it passes.
    """
    text = model.config.get_text_config()
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        return "its attention goes by chunks of the context"
    most = longest_alike(model)
    if most is not None and longest > most:
        return f"a row of more than {most:,} tokens would change the positions of all others"
    passed = _PASSED.get(model)
    return None if passed is not None and passed[:2] == (model.dtype, fused(model)) else _tried(model)


def longest_alike(model: PreTrainedModel) -> int | None:
    """Up to what length the rotary embedding of a row does not depend on the longest beside it; None for any.

    `transformers` takes the frequencies of the longest position in a pass for all its rows. Those of "longrope" change
    where the original context ends; those of "dynamic" only where the model's own does, beyond which no row goes.
    """
    text = model.config.get_text_config()
    found: Any = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]  # some have one a layer type
    contexts = [
        kind.get("original_max_position_embeddings") or text.original_max_position_embeddings
        for kind in kinds
        if (kind.get("rope_type") or kind.get("type")) == "longrope"
    ]
    return min(map(int, contexts), default=None)


def places_in_memory(model: PreTrainedModel, reserved: int = 0) -> int:
    """Tokens whose keys and values fit into what is free, but for so many bytes; the model passed `why_not_batched`."""
    free = max(0, available_memory(model.device) - reserved)
    return int(free * _MEMORY_SHARE) // _PASSED[model].bytes_per_place


@torch.no_grad()
def refuse_unmixable(model: PreTrainedModel, mixed: Mixed, name: str) -> None:
    """Raise where a pass in which each token has an adapter of its own is not what the adapter's layers compute by.

    Raises:
        AdapterStateError: a layer sees some of the tokens only, as an expert does.
    """
    passes = Passes(model, Slots(1, 4))
    passes.mixed = mixed
    with evaluating(model):
        passes.over((), (), [(0, 0, 0)], (name,))


@torch.no_grad()
def _tried(model: PreTrainedModel) -> str | None:
    """Why the logits of two rows that are continued together differ from those of whole passes over each."""
    embeddings: Any = model.get_input_embeddings()
    dice = torch.Generator().manual_seed(0)
    lengths = [count + steps for count, steps in zip(_PROMPTS, _STEPS, strict=True)]
    rows = [torch.randint(embeddings.weight.shape[0], (length,), generator=dice) for length in lengths]
    slots = Slots(len(rows), max(lengths))
    try:
        with evaluating(model):
            alone = [model(input_ids=row[None].to(model.device), use_cache=False).logits[0] for row in rows]
            expected = torch.cat([logits[count - 1 :] for logits, count in zip(alone, _PROMPTS, strict=True)]).float()
            found = _continued(Passes(model, slots), [row.tolist() for row in rows]).float()
    except CannotPackError as error:
        return str(error)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        return f"continuing rows fails in it ({type(error).__name__})"
    # Rounding differs with the shapes of the matrix products; what is computed otherwise is off by its own size.
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    deviation = float((found - expected).norm() / expected.norm())
    if not deviation <= tolerance:
        return f"continued rows deviate from lone ones by {deviation:.1%}"
    _PASSED[model] = _Passed(model.dtype, fused(model), slots.bytes_per_place)
    return None


def _continued(passes: Passes, rows: list[list[int]]) -> Tensor:
    """The logits of each row's last prompt token and of those that follow, row after row."""
    (a, b, c), (one, other, late) = _PROMPTS, rows
    found = [
        passes.over((), (), [one[:a], other[:b]], (None, None)),
        passes.over([one[a], other[b]], [a + 1, b + 1], [late[:c]], (None, None, None)),
        passes.over([one[a + 1], other[b + 1], late[c]], [a + 2, b + 2, c + 1], (), (None, None, None)),
    ]
    return torch.cat([torch.stack([logits[row] for logits in found if row < len(logits)]) for row in range(3)])
