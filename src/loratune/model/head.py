"""Logits at chosen positions only, and as few of them at once as the caller likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loratune.lora import selecting
from loratune.model.last_layer import ends_early
from loratune.model.modes import evaluating


@contextmanager
def only_positions(model: nn.Module, index: Tensor) -> Iterator[None]:
    """Inside the block the model's output head sees the hidden states at `index` alone.

    The selection happens before the head, so everything that `forward` does with logits (soft caps, scales) still
    happens to the chosen ones. `index` counts positions in the flattened (rows × tokens); logits come out as
    (1, len(index), vocabulary).
    """
    with _before_head(model, lambda hidden: hidden.reshape(-1, hidden.shape[-1])[index].unsqueeze(0), index):
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

    with _before_head(model, keep, index[:0]):
        model(**inputs)
    return seen[0]


def logits_from(model: nn.Module, hidden: Tensor, index: Tensor) -> Tensor:
    """Logits (N, vocabulary) of hidden states (N, features) before the head: by the model's own `forward`.

    What stands before the head is stepped over, so that the head, what is adapted of it, and all that the family does
    with its logits afterwards are the model's own.

    Args:
        index: (N,), the positions that they are the hidden states of; their dropout masks are those of these tokens.
    """
    trunk: Any = model.base_model
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    answer = partial(_OUTPUTS[model], last_hidden_state=hidden.unsqueeze(0))
    with _answering(trunk, lambda *_, **__: answer()), selecting(model, index):
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
    hidden = hidden_at(model, ids[0], {"input_ids": ids, "use_cache": False})
    _OUTPUTS[model] = kinds[0]
    same = torch.allclose(logits_from(model, hidden, ids[0]), whole, rtol=1e-2, atol=1e-2 * float(whole.abs().max()))
    return kinds[0] if same else None


@contextmanager
def _before_head(model: nn.Module, change: Callable[[Tensor], Tensor], index: Tensor) -> Iterator[None]:
    """Inside the block the head is given what `change` makes of its input: the hidden states at `index`."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    inside = ExitStack()

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inside.enter_context(selecting(head, index))
        return change(args[0]), *args[1:]

    def after(*_: Any) -> None:
        inside.close()

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield
    finally:
        inside.close()
        for handle in handles:
            handle.remove()


@contextmanager
def _answering(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Inside the block a call of the module gives `answer(...)`: nothing is computed, and no hook hears of it."""
    before = vars(module).get(_CALLED)
    vars(module)[_CALLED] = answer
    try:
        yield
    finally:
        if before is None:
            del vars(module)[_CALLED]
        else:
            vars(module)[_CALLED] = before


# Where a module keeps what runs instead of its hooks and its `forward` (`nn.Module.compile` puts it there).
_CALLED = "_compiled_call_impl"
