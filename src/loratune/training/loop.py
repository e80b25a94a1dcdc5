"""The one training loop. It sees rows, a model, an optimizer and a schedule; no paths, no settings, no console."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn

from loratune.adapt import Adapters
from loratune.data.batch import Batch
from loratune.data.order import Order
from loratune.data.pack import Layout, batches
from loratune.data.render import Rendered
from loratune.errors import DivergedError, OutOfMemoryError
from loratune.lora import TokenCounter
from loratune.loss import summed_loss
from loratune.model import evaluating, peak_memory
from loratune.training.events import Listener, Noticed, StepDone, Validated
from loratune.training.memory import is_out_of_memory, release_memory
from loratune.training.optimizer import clipped_norm, set_lr
from loratune.training.processes import Processes
from loratune.training.schedule import Schedule
from loratune.training.sharding import is_sharded

# What to do about a run that diverged: its folder is that of the rate it was started with.
LOWER = "lower --lr, with another --out; its last checkpoint, if there was one, is kept"
# A mean loss so many nats above both that of guessing and that of the base: nothing leads back from there.
_FAR = 10.0
# A loss is summed over many tokens in fp32: so near two are the same, relative.
_ROUNDING = 1e-4


@dataclass(frozen=True, slots=True)
class Work:
    """What a run goes through: its rows, their order, and how a step is laid out.

    Attributes:
        choices: among how many answers a supervised token is one: the vocabulary, labels; 0 where that varies.
    """

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
    choices: int


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
    """What the loop calls: `evaluate` gives the held-out loss, `save` writes a checkpoint, `stop` asks to end.

    `evaluate` is told how many tokens may go through the model at once. Without `save` nothing is kept.
    """

    emit: Listener
    evaluate: Callable[[int], float] | None
    save: Callable[[Progress], None] | None
    stop: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Loop:
    """The parts of a training run, and the way they go through it together.

    Every process runs the same loop over the same steps; which rows of a step are its own is all that differs.
    """

    model: nn.Module
    lora: Adapters
    work: Work
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    processes: Processes
    progress: Progress
    hooks: Hooks

    def run(self) -> None:
        """Train from `progress.step` to the schedule's end, an early stop, or until `hooks.stop` says so, and save.

        A step's loss is the sum over its supervised tokens divided by their number, over all its micro-batches and
        all processes.

        Raises:
            DivergedError: a loss or gradient is not finite, a loss is far above that of guessing, or the adapter has
                grown until every answer is as likely as every other and nothing reaches it any more. Weights with
                which that is so are not saved.
            OutOfMemoryError: not even one row at a time fits, or a sharded model ran out of memory.
        """
        work, progress = self.work, self.progress
        while not progress.ended(self.schedule) and not self.hooks.stop():
            self._step()
            last = progress.step == self.schedule.steps
            if self.hooks.evaluate and (last or (work.eval_every and progress.step % work.eval_every == 0)):
                self._validate(self.held_out_loss())
            due = work.save_every and progress.step % work.save_every == 0
            if self.hooks.save and due and not progress.ended(self.schedule):
                self._save(self.hooks.save)
        if progress.ended(self.schedule):
            self._keep_best()
        if self.hooks.save:
            self._save(self.hooks.save)

    def _save(self, save: Callable[[Progress], None]) -> None:
        if self.progress.step:
            self._refuse_diverged(self._rows_of(self.progress.step - 1))
        save(self.progress)

    def _refuse_diverged(self, rows: Sequence[Rendered]) -> None:
        """Raise where the weights do badly with the rows of the last step: its loss was that of the weights before."""
        loss = self._loss(rows)
        what = f"step {self.progress.step}: loss {loss:g} after it"
        if not math.isfinite(loss):
            self._diverged(what)
        if self._is_far(loss, lambda: self._loss(rows)):
            self._far(what)
        if self._is_flat(rows, loss):
            self._gradients_within_memory(rows)
            if clipped_norm(self.lora.parameters(), math.inf) == 0:
                self._flat(what)
            self.optimizer.zero_grad()

    def _rows_of(self, step: int) -> list[Rendered]:
        return [self.work.rows[i] for i in self.work.order.step(step)]

    def _step(self) -> None:
        started = time.perf_counter()
        progress = self.progress
        rows = self._rows_of(progress.step)
        loss, computed = self._gradients_within_memory(rows)
        norm = clipped_norm(self.lora.parameters(), self.work.clip or math.inf)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._diverged(f"step {progress.step + 1}: loss {loss:g}, gradient norm {norm:g}")
        if norm == 0 and self._is_flat(rows, loss):
            self._flat(f"step {progress.step + 1}: loss {loss:g}")
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
                supervised_tokens=sum(row.units for row in rows),
                examples=len(rows),
                step_seconds=time.perf_counter() - started,
                peak_memory_bytes=peak_memory(self.work.device),
            )
        )

    def held_out_loss(self) -> float:
        """Of the present weights; there must be held-out rows."""
        assert self.hooks.evaluate is not None, "who asks knows that there are some"
        return self._within_memory(self.hooks.evaluate)

    def _validate(self, val_loss: float) -> None:
        progress, patience = self.progress, self.work.patience
        if not math.isfinite(val_loss):
            self._diverged(f"step {progress.step}: held-out loss {val_loss:g}")
        if self._is_far(val_loss, self.held_out_loss):
            self._far(f"step {progress.step}: held-out loss {val_loss:g}")
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
        """The step's gradients; where memory runs out in a process the micro-batch halves and the step is done again.

        Returns:
            its loss, and the tokens that went through the model.
        """
        work, progress, processes = self.work, self.progress, self.processes
        supervised = sum(row.units for row in rows)
        while True:
            limit, part = progress.micro_batch_tokens, processes.part
            step = batches(rows, work.layout, limit=limit, pad_id=work.pad_id, part=part)
            several = any(batch.examples > 1 for batch in step)
            loss, computed, failed = 0.0, 0, False
            try:
                loss, computed = self._gradients(step, supervised)
            except Exception as error:
                if not is_out_of_memory(error) or is_sharded(self.lora.parameters()[0]):
                    raise  # the other processes wait in the midst of a sharded pass: there is no way back
                failed = True
            # Outside the except block, so that the traceback no longer holds the failed step's tensors.
            loss, tokens, failures, splittable = processes.sums(loss, computed, failed, several)
            if not failures:
                processes.add_gradients(self.lora.parameters())
                return loss, round(tokens)
            self.model.zero_grad()
            self._halve(splittable=bool(splittable))

    def _within_memory(self, compute: Callable[[int], float]) -> float:
        """What is computed without gradients of so many tokens at once; of half as many where memory runs out.

        Several processes would wait in it for the one that runs out: there it is an error.
        """
        while True:
            try:
                return compute(self.progress.micro_batch_tokens)
            except Exception as error:
                if not is_out_of_memory(error) or self.processes.count > 1:
                    raise
            self._halve(splittable=True)  # outside the except block, as above

    def _halve(self, *, splittable: bool) -> None:
        progress = self.progress
        release_memory()
        if progress.micro_batch_tokens <= 1 or not splittable:
            raise OutOfMemoryError(
                f"step {progress.step + 1}: out of memory with one row at a time",
                hint="lower --max-length, or use --recompute on",
            )
        progress.micro_batch_tokens //= 2
        text = f"micro-batch halved to {progress.micro_batch_tokens} tokens"
        self.hooks.emit(Noticed(progress.step, "out of memory", text))

    def _gradients(self, micro_batches: Sequence[Batch], supervised: int) -> tuple[float, int]:
        """Accumulate this process's gradients of one step; returns its part of the loss and of the tokens."""
        work, step, device, part = self.work, self.progress.step, self.work.device, self.processes.part
        total = torch.zeros((), device=device)
        for number, here in enumerate(micro_batches):
            batch = here.to(device)
            # Whatever a family still draws by itself (its dropout is off) is drawn the same after a resume.
            torch.manual_seed(_seed_of(work.seed, step, number * part.of + part.number))
            with self.lora.counting(TokenCounter(work.seed, step, batch.tokens)):
                loss = summed_loss(self.model, batch) / supervised
                loss.backward()
            total += loss.detach()
        return float(total), sum(batch.computed_tokens for batch in micro_batches)

    def _is_flat(self, rows: Sequence[Rendered], loss: float) -> bool:
        """Whether the loss is that of guessing, and is so by the adapter.

        What a run has learned, and rows that nothing trained sees, give no gradient either, at other losses. Hidden
        states that overflow become zeros in the last norm, and logits that are all alike.
        """
        guessing = self._guessing()
        if not guessing or not math.isclose(loss, guessing, rel_tol=_ROUNDING):
            return False
        with self.lora.disabled():
            return not math.isclose(self._loss(rows), guessing, rel_tol=_ROUNDING)

    @torch.no_grad()
    def _loss(self, rows: Sequence[Rendered]) -> float:
        """The loss of rows with the present weights, without dropout."""
        work, processes = self.work, self.processes

        def own_part(limit: int) -> float:
            step = batches(rows, work.layout, limit=limit, pad_id=work.pad_id, part=processes.part)
            with evaluating(self.model):
                return sum(float(summed_loss(self.model, batch.to(work.device))) for batch in step)

        return processes.sums(self._within_memory(own_part))[0] / sum(row.units for row in rows)

    def _is_far(self, loss: float, again: Callable[[], float]) -> bool:
        """Whether a loss is far above that of guessing, and, where `again` computes it, that of the base is not."""
        if loss <= self._guessing() + _FAR:
            return False
        with self.lora.disabled():
            return loss > again() + _FAR

    def _guessing(self) -> float:
        """The loss where all answers are as likely; 0 where how many there are varies."""
        return math.log(max(1, self.work.choices))

    def _far(self, what: str) -> NoReturn:
        self._diverged(f"{what}, more than {_FAR:g} above that of guessing and that of the base")

    def _flat(self, what: str) -> NoReturn:
        self._diverged(f"{what}, every one of {self.work.choices} answers is as likely, gradient norm 0")

    def _diverged(self, what: str) -> NoReturn:
        self.optimizer.zero_grad()
        raise DivergedError(what, hint=LOWER)


def _seed_of(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
