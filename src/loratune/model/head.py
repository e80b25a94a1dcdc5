"""Logits at chosen positions only, and as few of them at once as the caller likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loratune.model.last_layer import ends_early
from loratune.model.modes import evaluating


@contextmanager
def only_positions(model: nn.Module, index: Tensor) -> Iterator[None]:
    """Inside the block the model's output head sees the hidden states at `index` alone.

    The selection happens before the head, so everything that `forward` does with logits (soft caps, scales) still
    happens to the chosen ones. `index` counts positions in the flattened (rows × tokens); logits come out as
    (1, len(index), vocabulary).
    """
    with _before_head(model, lambda hidden: hidden.reshape(-1, hidden.shape[-1])[index].unsqueeze(0)):
        yield


def hidden_at(model: nn.Module, index: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What the output head would be given at `index`, as (len(index), features); no logits are computed."""
    seen: list[Tensor] = []
    picked = inputs.get("segments") is not None and ends_early(model)
    if picked:
        inputs = {**inputs, "scored": index}

    def keep(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        seen.append(flat if picked else flat[index])
        return hidden[:, :0]

    with _before_head(model, keep):
        model(**inputs)
    return seen[0]


def logits_from(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (N, vocabulary) of hidden states (N, features) before the head: by the model's own `forward`.

    What stands before the head is stepped over, so that the head, what is adapted of it, and all that the family does
    with its logits afterwards are the model's own.
    """
    trunk: Any = model.base_model
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with _answering(trunk, lambda *_, **__: _OUTPUTS[model](last_hidden_state=hidden.unsqueeze(0))):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.flatten(0, 1)  # a view; picking the one row would fill and copy its gradient


# The kind of output that a model's trunk gives, where `logits_from` was tried and found right; None where not.
_OUTPUTS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def has_separate_head(model: nn.Module) -> bool:
    """Whether `hidden_at` and `logits_from` together give what `forward` gives; tried once for each model."""
    if model not in _OUTPUTS:
        _OUTPUTS[model] = None
        try:
            with evaluating(model):
                _OUTPUTS[model] = _tried(model)
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError):
            _OUTPUTS[model] = None
    return _OUTPUTS[model] is not None


@torch.no_grad()
def _tried(model: Any) -> Any:
    """The trunk's kind of output if the logits of three tokens come out equal, else None."""
    if model.base_model is model:
        return None
    ids = torch.arange(3, device=model.device)[None]
    kinds: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda _, __, output: kinds.append(type(output)))
    try:
        whole = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    hidden = hidden_at(model, torch.arange(3, device=model.device), {"input_ids": ids, "use_cache": False})
    _OUTPUTS[model] = kinds[0]
    same = torch.allclose(logits_from(model, hidden), whole, rtol=1e-2, atol=1e-2 * float(whole.abs().max()))
    return kinds[0] if same else None


@contextmanager
def _before_head(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _answering(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Inside the block a call of the module gives `answer(...)` and computes nothing."""
    before = vars(module).get("forward")
    module.forward = answer
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
