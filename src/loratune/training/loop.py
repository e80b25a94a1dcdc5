"""The one training loop. It sees rows, a model, an optimizer and a schedule; no paths, no settings, no console."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from loratune.adapt import Adapters
from loratune.data.batch import Batch, make_batch, needed, offsets
from loratune.data.pack import Order, micro_batches
from loratune.data.render import Rendered
from loratune.errors import DivergedError, OutOfMemoryError
from loratune.lora import TokenCounter
from loratune.loss import summed_loss
from loratune.model import peak_memory
from loratune.training.events import Listener, Noticed, StepDone, Validated
from loratune.training.memory import is_out_of_memory, release_memory
from loratune.training.optimizer import set_lr
from loratune.training.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Work:
    """What a run goes through: its rows, their order, and how a step is split."""

    rows: Sequence[Rendered]
    order: Order
    packed: bool
    pad_id: int
    seed: int
    clip: float
    eval_every: int | None
    save_every: int | None
    patience: int


@dataclass(slots=True)
class Progress:
    """Where a run stands; everything else follows from (seed, step).

    Attributes:
        step: steps done. micro_batch_tokens: the present limit of a micro-batch.
        best: the adapter's tensors at the best validation, kept where training may stop early.
    """

    step: int
    micro_batch_tokens: int
    best_val: float = math.inf
    best_step: int = 0
    worse: int = 0
    best: list[Tensor] = field(default_factory=list)
    stopped_early: bool = False

    def ended(self, schedule: Schedule) -> bool:
        return self.step >= schedule.steps or self.stopped_early


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls: `evaluate` gives the held-out loss, `save` writes a checkpoint, `stop` asks to end."""

    emit: Listener
    evaluate: Callable[[], float] | None
    save: Callable[[Progress], None]
    stop: Callable[[], bool]


def fit(
    model: nn.Module,
    lora: Adapters,
    work: Work,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    accelerator: Accelerator,
    progress: Progress,
    hooks: Hooks,
) -> None:
    """Train from `progress.step` to the schedule's end, an early stop, or until `hooks.stop` says so.

    A step's loss is the sum over its supervised tokens divided by their number, over all its micro-batches.

    Raises:
        DivergedError: a loss or gradient is not finite; the weights are those before that step.
        OutOfMemoryError: not even one row at a time fits.
    """
    parameters = lora.parameters()
    while not progress.ended(schedule) and not hooks.stop():
        _step(model, lora, work, optimizer, schedule, accelerator, progress, hooks)
        last = progress.step == schedule.steps
        if hooks.evaluate and (last or (work.eval_every and progress.step % work.eval_every == 0)):
            _validate(hooks.evaluate, parameters, work, progress, hooks.emit)
        if work.save_every and progress.step % work.save_every == 0 and not progress.ended(schedule):
            hooks.save(progress)
    if progress.ended(schedule):
        _keep_best(parameters, work, progress, hooks.emit)


def _step(
    model: nn.Module,
    lora: Adapters,
    work: Work,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    accelerator: Accelerator,
    progress: Progress,
    hooks: Hooks,
) -> None:
    started = time.perf_counter()
    rows = [work.rows[i] for i in work.order.step(progress.step)]
    loss, computed = _gradients_within_memory(model, lora, rows, work, accelerator, progress, hooks.emit)
    norm = float(accelerator.clip_grad_norm_(lora.parameters(), work.clip or math.inf) or 0.0)
    if not math.isfinite(loss) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise DivergedError(
            f"step {progress.step + 1}: loss {loss:g}, gradient norm {norm:g}",
            hint="lower --lr; the last checkpoint is kept",
        )
    lr = schedule.lr(progress.step)
    set_lr(optimizer, lr, schedule.peak)
    optimizer.step()
    optimizer.zero_grad()
    progress.step += 1
    hooks.emit(
        StepDone(
            step=progress.step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=sum(len(row.ids) for row in rows),
            computed_tokens=computed,
            supervised_tokens=sum(sum(row.supervised) for row in rows),
            examples=len(rows),
            step_seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory(accelerator.device),
        )
    )


def _validate(
    evaluate: Callable[[], float], parameters: Sequence[Tensor], work: Work, progress: Progress, emit: Listener
) -> None:
    val_loss = evaluate()
    emit(Validated(progress.step, val_loss))
    if val_loss < progress.best_val:
        progress.best_val, progress.best_step, progress.worse = val_loss, progress.step, 0
        if work.patience:
            progress.best = [parameter.detach().clone() for parameter in parameters]
        return
    progress.worse += 1
    if work.patience and progress.worse >= work.patience:
        progress.stopped_early = True
        text = f"{progress.worse} validations without a better loss than {progress.best_val:.4f}"
        emit(Noticed(progress.step, "early stop", text))


@torch.no_grad()
def _keep_best(parameters: Sequence[Tensor], work: Work, progress: Progress, emit: Listener) -> None:
    """Where training may stop early, the adapter that is kept is the one with the best held-out loss."""
    if work.patience and progress.best and progress.best_step != progress.step:
        for parameter, best in zip(parameters, progress.best, strict=True):
            parameter.copy_(best)
        emit(Noticed(progress.step, "best adapter", f"the adapter of step {progress.best_step} is kept"))


def _gradients_within_memory(
    model: nn.Module,
    lora: Adapters,
    rows: Sequence[Rendered],
    work: Work,
    accelerator: Accelerator,
    progress: Progress,
    emit: Listener,
) -> tuple[float, int]:
    """The step's gradients; where memory runs out the micro-batch halves and the step is done again."""
    while True:
        try:
            return step_gradients(model, lora, rows, work, accelerator, progress)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block, so that the traceback no longer holds the failed step's tensors.
        model.zero_grad()
        release_memory()
        if progress.micro_batch_tokens <= 1 or len(_groups(rows, work, progress)) == len(rows):
            raise OutOfMemoryError(
                f"step {progress.step + 1}: out of memory with one row at a time",
                hint="lower --max-length, or use --recompute on",
            )
        progress.micro_batch_tokens //= 2
        emit(Noticed(progress.step, "out of memory", f"micro-batch halved to {progress.micro_batch_tokens} tokens"))


def step_gradients(
    model: nn.Module,
    lora: Adapters,
    rows: Sequence[Rendered],
    work: Work,
    accelerator: Accelerator,
    progress: Progress,
) -> tuple[float, int]:
    """Accumulate the gradients of one step; returns its loss and the tokens that went through the model."""
    supervised = sum(sum(row.supervised) for row in rows)
    starts = offsets(rows)
    total = torch.zeros((), device=accelerator.device)
    computed = 0
    for number, group in enumerate(_groups(rows, work, progress)):
        batch: Batch = make_batch(
            [rows[i] for i in group], packed=work.packed, pad_id=work.pad_id, starts=[starts[i] for i in group]
        ).to(accelerator.device)
        # The model's own dropout (GPT-2 has some) draws from torch's generator: the same numbers after a resume.
        torch.manual_seed(_seed_of(work.seed, progress.step, number))
        with lora.counting(TokenCounter(work.seed, progress.step, batch.tokens)):
            loss = summed_loss(model, batch) / supervised
            accelerator.backward(loss)
        total += loss.detach()
        computed += batch.computed_tokens
    return float(total), computed


def _groups(rows: Sequence[Rendered], work: Work, progress: Progress) -> list[list[int]]:
    return micro_batches([needed(row) for row in rows], progress.micro_batch_tokens, packed=work.packed)


def _seed_of(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
