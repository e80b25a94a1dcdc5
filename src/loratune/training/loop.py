"""The one training loop. It sees rows, a model, an optimizer and a schedule; no paths, no settings, no console."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from loratune.adapt import Adapters
from loratune.data.batch import Batch
from loratune.data.order import Order
from loratune.data.pack import Layout, batches
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
    """What a run goes through: its rows, their order, and how a step is laid out."""

    rows: Sequence[Rendered]
    order: Order
    layout: Layout
    pad_id: int
    seed: int
    clip: float
    eval_every: int | None
    save_every: int | None
    patience: int
    device: torch.device


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


@dataclass(frozen=True, slots=True)
class Loop:
    """The parts of a training run, and the way they go through it together."""

    model: nn.Module
    lora: Adapters
    work: Work
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    accelerator: Accelerator
    progress: Progress
    hooks: Hooks

    def run(self) -> None:
        """Train from `progress.step` to the schedule's end, an early stop, or until `hooks.stop` says so.

        A step's loss is the sum over its supervised tokens divided by their number, over all its micro-batches.

        Raises:
            DivergedError: a loss or gradient is not finite; the weights are those before that step.
            OutOfMemoryError: not even one row at a time fits.
        """
        work, progress = self.work, self.progress
        while not progress.ended(self.schedule) and not self.hooks.stop():
            self._step()
            last = progress.step == self.schedule.steps
            if self.hooks.evaluate and (last or (work.eval_every and progress.step % work.eval_every == 0)):
                self._validate(self.hooks.evaluate())
            if work.save_every and progress.step % work.save_every == 0 and not progress.ended(self.schedule):
                self.hooks.save(progress)
        if progress.ended(self.schedule):
            self._keep_best()

    def _step(self) -> None:
        started = time.perf_counter()
        progress = self.progress
        rows = [self.work.rows[i] for i in self.work.order.step(progress.step)]
        loss, computed = self._gradients_within_memory(rows)
        norm = float(self.accelerator.clip_grad_norm_(self.lora.parameters(), self.work.clip or math.inf) or 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.zero_grad()
            self._diverged(f"step {progress.step + 1}: loss {loss:g}, gradient norm {norm:g}")
        lr = self.schedule.lr(progress.step)
        set_lr(self.optimizer, lr, self.schedule.peak)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        self.hooks.emit(
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
                peak_memory_bytes=peak_memory(self.work.device),
            )
        )

    def _validate(self, val_loss: float) -> None:
        progress, patience = self.progress, self.work.patience
        if not math.isfinite(val_loss):
            self._diverged(f"step {progress.step}: held-out loss {val_loss:g}")
        self.hooks.emit(Validated(progress.step, val_loss))
        if val_loss < progress.best_val:
            progress.best_val, progress.best_step, progress.worse = val_loss, progress.step, 0
            if patience:
                progress.best = [parameter.detach().clone() for parameter in self.lora.parameters()]
            return
        progress.worse += 1
        if patience and progress.worse >= patience:
            progress.stopped_early = True
            text = f"{progress.worse} validations without a better loss than {progress.best_val:.4f}"
            self.hooks.emit(Noticed(progress.step, "early stop", text))

    @torch.no_grad()
    def _keep_best(self) -> None:
        """Where training may stop early, the adapter that is kept is the one with the best held-out loss."""
        progress = self.progress
        if self.work.patience and progress.best and progress.best_step != progress.step:
            for parameter, best in zip(self.lora.parameters(), progress.best, strict=True):
                parameter.copy_(best)
            self.hooks.emit(Noticed(progress.step, "best adapter", f"the adapter of step {progress.best_step} is kept"))

    def _gradients_within_memory(self, rows: Sequence[Rendered]) -> tuple[float, int]:
        """The step's gradients; where memory runs out the micro-batch halves and the step is done again."""
        work, progress = self.work, self.progress
        supervised = sum(sum(row.supervised) for row in rows)
        while True:
            step = batches(rows, work.layout, limit=progress.micro_batch_tokens, pad_id=work.pad_id)
            try:
                return self._gradients(step, supervised)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the except block, so that the traceback no longer holds the failed step's tensors.
            self.model.zero_grad()
            release_memory()
            if progress.micro_batch_tokens <= 1 or len(step) == len(rows):
                raise OutOfMemoryError(
                    f"step {progress.step + 1}: out of memory with one row at a time",
                    hint="lower --max-length, or use --recompute on",
                )
            progress.micro_batch_tokens //= 2
            text = f"micro-batch halved to {progress.micro_batch_tokens} tokens"
            self.hooks.emit(Noticed(progress.step, "out of memory", text))

    def _gradients(self, micro_batches: Sequence[Batch], supervised: int) -> tuple[float, int]:
        """Accumulate the gradients of one step; returns its loss and the tokens that went through the model."""
        work, step, device = self.work, self.progress.step, self.work.device
        total = torch.zeros((), device=device)
        for number, here in enumerate(micro_batches):
            batch = here.to(device)
            # Whatever a family still draws by itself (its dropout is off) is drawn the same after a resume.
            torch.manual_seed(_seed_of(work.seed, step, number))
            with self.lora.counting(TokenCounter(work.seed, step, batch.tokens)):
                loss = summed_loss(self.model, batch) / supervised
                self.accelerator.backward(loss)
            total += loss.detach()
        return float(total), sum(batch.computed_tokens for batch in micro_batches)

    def _diverged(self, what: str) -> NoReturn:
        raise DivergedError(what, hint="lower --lr; the last checkpoint is kept")


def _seed_of(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
