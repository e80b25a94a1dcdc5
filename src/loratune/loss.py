"""Cross-entropy over the supervised tokens, as a sum: dividing by a step's count is the caller's.

Only the positions that predict a supervised token get logits, some of them at a time, and the gradient of each is
formed as soon as they are there: neither a (tokens × vocabulary) matrix nor its gradient ever exists (the idea of Hsu
et al., "Liger Kernel", arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loratune.data.batch import Batch
from loratune.data.labelled import LabelBatch
from loratune.data.located import LocatedBatch
from loratune.data.matched import MatchBatch
from loratune.data.translated import TranslatedBatch
from loratune.kernels import kernels_for
from loratune.lora import selecting
from loratune.model import has_separate_head, hidden_at, logits_from, only_positions, packed_inputs

# Positions whose logits exist at once, and those whose probabilities do, in fp32: a processor's cache holds few, an
# accelerator is idle with few.
_CHUNK, _CACHED = {"cpu": 256}, {"cpu": 32}
_WIDE_CHUNK = 2048
# Of cosines, as sentence encoders are trained; and a logit whose probability is none.
_TEMPERATURE, _NEVER = 0.05, -1e4
# So far below the likeliest token a pad is: e⁻³⁰ of its probability is lost in fp32, and no logit dwarfs the others.
_BELOW = 30.0


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (N, choices) of what the batch has targets for, in the model's dtype: the vocabulary, or labels."""
    return _LOGITS[type(batch)](model, batch)


def _next_tokens(model: nn.Module, batch: Batch) -> Tensor:
    with only_positions(model, batch.scored):
        logits: Tensor = model(**_inputs(batch)).logits
    return logits[0]


def _labels(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**_read(batch)).logits
    return logits.flatten(0, -2)[batch.scored]


def _read(batch: Batch) -> dict[str, Any]:
    """Positions are left to the model, and so is which token stands for the row: encoders have ways of their own."""
    assert isinstance(batch, LabelBatch)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return inputs if batch.types is None else {**inputs, "token_type_ids": batch.types}


def _ends(model: nn.Module, batch: Batch) -> Tensor:
    """Of each window two rows: how likely an answer begins at each of its tokens, and ends there. A pad never does."""
    found: Any = model(**_read(batch))
    logits = torch.stack([found.start_logits, found.end_logits], 1)
    there: Any = batch.attention_mask
    own = there[:, None].expand_as(logits)
    likeliest = logits.detach().masked_fill(~own, -torch.inf).amax(-1, keepdim=True)
    return torch.where(own, logits, likeliest - _BELOW).flatten(0, 1)


def _matches(model: nn.Module, batch: Batch) -> Tensor:
    """Of each row's first text, its cosine with every row's second one, over the temperature.

    The cross-entropy of these is InfoNCE with the step's other rows as negatives (van den Oord et al.,
    arXiv:1807.03748). Equal second texts are no negatives of each other.
    """
    assert isinstance(batch, MatchBatch)
    assert batch.same is not None
    first, second = vectors_of(model, batch).chunk(2)
    return (first @ second.T / _TEMPERATURE).masked_fill(batch.same, _NEVER)


def vectors_of(model: nn.Module, batch: MatchBatch) -> Tensor:
    """Of each text the mean of its tokens' last hidden states, of length one, in fp32.

    Where all texts at once are more tokens than may be, a few go through the model at a time, without what the backward
    pass needs; there they go through it again, for it to have the vectors of all first (gradient caching, Gao et al.,
    arXiv:2101.06983).
    """
    count, width = batch.input_ids.shape
    size = max(1, batch.at_once // width) if batch.at_once else count
    some = [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
    if len(some) == 1 or not torch.is_grad_enabled():
        return torch.cat([_vectors(model, batch, rows) for rows in some])
    return torch.cat([checkpoint(_vectors, model, batch, rows, use_reentrant=False) for rows in some])


def _vectors(model: nn.Module, batch: MatchBatch, rows: slice) -> Tensor:
    mask: Any = batch.attention_mask
    width = int(mask[rows].sum(1).max())
    whole = torch.arange(batch.tokens.numel(), device=mask.device).view_as(batch.tokens)
    with selecting(model, whole[rows, :width].flatten()):
        hidden: Tensor = model(input_ids=batch.input_ids[rows, :width], attention_mask=mask[rows, :width])[0]
    there = mask[rows, :width, None]
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return nn.functional.normalize((wide * there).sum(1) / there.sum(1), dim=-1)


def _written(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of what an encoder-decoder writes, at the decoder's positions that have a target."""
    assert isinstance(batch, TranslatedBatch)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits: Tensor = model(**inputs, decoder_input_ids=_before(model, batch.labels), use_cache=False).logits
    return logits.flatten(0, -2)[batch.scored]


def _before(model: Any, labels: Tensor | None) -> Tensor:
    """What the decoder is given to write `labels`: they moved by one, behind the token that the family begins with."""
    assert labels is not None
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        found: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return found
    begin = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
    moved = torch.cat([begin, labels[:, :-1]], 1)
    return moved.masked_fill(moved < 0, model.config.pad_token_id)


# What is chosen among, by the kind of batch.
_LOGITS: Mapping[type[Batch], Callable[[nn.Module, Batch], Tensor]] = {
    Batch: _next_tokens,
    LabelBatch: _labels,
    LocatedBatch: _ends,
    MatchBatch: _matches,
    TranslatedBatch: _written,
}


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Σ −log p(target) over all that the batch teaches, an fp32 scalar with a graph where gradients are on."""
    if isinstance(model, Objective):
        found: Tensor = model(batch)
        return found
    if type(batch) is not Batch or not has_separate_head(model):
        return cross_entropy(logits_of(model, batch), batch.targets, batch.times)
    hidden = hidden_at(model, batch.scored, _inputs(batch))
    trained = _trained(model, hidden, batch.scored)
    return _summed(
        hidden, batch.targets, batch.times, lambda some, part: logits_from(model, some, batch.scored[part]), trained
    )


class Objective(nn.Module):
    """A model's loss as a module: all that reads the model's parameters then runs inside one forward pass.

    What is sharded gathers its parameters for that long; this is its root.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return summed_loss(self.model, batch)


def _trained(model: nn.Module, hidden: Tensor, scored: Tensor) -> list[nn.Parameter]:
    """The parameters behind `hidden` that get a gradient; none where what is trained of the head is switched off."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    found = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return found if found and logits_from(model, hidden[:0].detach(), scored[:0]).requires_grad else []


def cross_entropy(logits: Tensor, targets: Tensor, times: Tensor | None = None) -> Tensor:
    """Σ −times · log softmax(logits)[target] in fp32.

    Args:
        logits: (N, vocabulary) of any float dtype; targets: (N,).
        times: (N,), how often each counts; once without it.
    """
    return _summed(logits, targets, times, lambda some, _: some, [])


def _inputs(batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if batch.segments is not None:
        return {**inputs, **packed_inputs(batch.segments, batch.above)}
    return {**inputs, "attention_mask": batch.attention_mask, "use_cache": False}


def _summed(
    hidden: Tensor,
    targets: Tensor,
    times: Tensor | None,
    logits_of: Callable[[Tensor, slice], Tensor],
    trained: list[nn.Parameter],
) -> Tensor:
    """The loss of `logits_of(hidden[part], part)`, where `trained` are the parameters that it depends on."""
    loss: Tensor = _SummedLoss.apply(hidden, targets, times, logits_of, *trained)  # type: ignore[no-untyped-call]
    return loss


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        times: Tensor | None,
        logits_of: Callable[[Tensor, slice], Tensor],
        *trained: Tensor,
    ) -> Tensor:
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        gradients: list[Tensor | None] = [torch.empty_like(hidden) if wanted[0] else None, *(None for _ in trained)]
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        size, _ = positions_at_once(hidden.device.type, len(targets))
        for begin in range(0, len(targets), size):
            part = slice(begin, begin + size)
            with torch.set_grad_enabled(any(wanted)):
                some = hidden[part].detach().requires_grad_(wanted[0])
                logits = logits_of(some, part)
            slope = torch.empty_like(logits, memory_format=torch.contiguous_format)
            often = None if times is None else times[part]
            total += _loss_and_slope(logits.detach(), targets[part], often, slope)
            inputs = [t for t, want in zip((some, *trained), wanted, strict=True) if want]
            if inputs:
                found = iter(torch.autograd.grad(logits, inputs, slope, allow_unused=True))
                _gather(gradients, part, [next(found) if want else None for want in wanted])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *others = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return first, None, None, None, *others


def _gather(gradients: list[Tensor | None], part: slice, found: list[Tensor | None]) -> None:
    """Put the gradient of some positions in its place, and add those of the parameters up."""
    first, *others = found
    if first is not None and gradients[0] is not None:
        gradients[0][part] = first
    for number, some in enumerate(others, 1):
        if some is not None:
            before = gradients[number]
            gradients[number] = some if before is None else before.add_(some)


def positions_at_once(device_type: str, scored: int) -> tuple[int, int]:
    """How many of the scored positions have logits at the same time, and how many of them probabilities in fp32.

    In equal parts, since a few that are left over would take nearly as long as many: up to half as many again as
    where no number of parts comes closer.
    """
    parts = max(1, round(scored / _CHUNK.get(device_type, _WIDE_CHUNK)))
    return max(1, -(-scored // parts)), min(scored, _CACHED.get(device_type, _WIDE_CHUNK))


def _loss_and_slope(logits: Tensor, targets: Tensor, times: Tensor | None, slope: Tensor) -> Tensor:
    """Σ −times · log p(target); puts its derivative by the logits, times · (p - [target]), into `slope`."""
    kernels, rows = kernels_for(logits), logits.shape[:1]
    fits = targets.dtype == torch.int64 and all(t.shape == rows for t in (targets, times) if t is not None)
    if fits and kernels is not None and hasattr(kernels, "cross_entropy"):  # of what does not fit torch says so
        lost: Tensor = kernels.cross_entropy(logits, targets, times, slope)
        return lost.sum()
    _, size = positions_at_once(logits.device.type, len(logits))
    wide = torch.promote_types(logits.dtype, torch.float32)
    buffer = torch.empty(size, logits.shape[-1], dtype=wide, device=logits.device)
    parts = []
    for some, chosen, out in zip(logits.split(size), targets[:, None].split(size), slope.split(size), strict=True):
        exact = buffer[: len(some)].copy_(some)
        highest = exact.amax(-1)
        p = torch.softmax(exact, -1, out=exact)
        # log p of the likeliest token says what the softmax divided by; p of the target itself may be zero in fp32.
        parts.append(highest - p.amax(-1).log() - some.gather(1, chosen)[:, 0].to(wide))
        out.copy_(p.scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=wide)))
    by_position = torch.cat(parts)
    if times is not None:
        by_position = by_position * times
        slope.mul_(times[:, None].to(slope.dtype))
    return by_position.sum()
