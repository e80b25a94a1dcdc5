"""This project: its own set-up of a run decides packing, sharing, micro-batch and recomputation; its loop trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from clock import Clock
from job import Job, Row, Workload, in_batches
from weights import load_model

import loratune as lt
from loratune.adapt import Adapters
from loratune.config import TrainConfig
from loratune.data.example import Corpus, Place
from loratune.data.fit import fit
from loratune.data.render import Rendered, RenderedCorpus
from loratune.data.split import Split
from loratune.model import adapter_training, find_base, freed_memory_kept, load_tokenizer, recompute_activations
from loratune.run import setup as run_setup
from loratune.run.prepare import Prepared
from loratune.run.setup import Setup, set_up
from loratune.run.train import _work as work_of
from loratune.training.events import Event, StepDone
from loratune.training.loop import Hooks, Loop, Progress, Work
from loratune.training.optimizer import make_optimizer
from loratune.training.processes import Processes
from loratune.training.schedule import Schedule


@dataclass(frozen=True)
class Given:
    """An order of steps that is not drawn: rows as they stand."""

    steps: Sequence[Sequence[int]]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.steps)

    def step(self, number: int) -> tuple[int, ...]:
        return tuple(self.steps[number])


@dataclass(frozen=True)
class Run:
    """A run that has been set up: everything but the rows it goes through."""

    job: Job
    setup: Setup
    lora: Adapters

    def work(self, rows: Sequence[Row] = (), batch_size: int = 0) -> Work:
        """The product's own way through its rows, or these in this order. All that knows of `Work` is here."""
        own = replace(work_of(self.setup), eval_every=None, save_every=None, patience=0)
        if not rows:
            return own
        steps = in_batches(range(len(rows)), batch_size)
        return replace(own, rows=tuple(rendered(rows)), order=Given(steps))  # type: ignore[arg-type]

    def go_through(self, work: Work, optimizer: torch.optim.Optimizer, hear: Callable[[StepDone], None]) -> None:
        """Every row once, as `loratune.run.train` does it, without validation and checkpoints."""
        decisions = self.setup.decisions
        steps = work.order.steps_per_epoch
        schedule = Schedule(decisions["schedule"], decisions["lr"], steps, 0)

        def emit(event: Event) -> None:
            if isinstance(event, StepDone):
                hear(event)

        hooks = Hooks(emit, None, None, lambda: False)
        progress = Progress(0, decisions["micro_batch_tokens"])
        loop = Loop(self.setup.model, self.lora, work, optimizer, schedule, Processes(), progress, hooks)
        with freed_memory_kept(self.setup.base.device):
            loop.run()

    def optimizer(self) -> torch.optim.Optimizer:
        decisions = self.setup.decisions
        groups = self.lora.param_groups(decisions["lr"], weight_decay=decisions["weight_decay"])
        return make_optimizer(decisions["optimizer"], groups, decisions["lr"])


def prepared(job: Job, workload: Workload, loaded: Callable[[], None] = lambda: None) -> Run:
    """Base, decisions, adapter. `loaded` is called when the base stands."""
    model = load_model(job.base, job.dtype, job.device)
    loaded()
    base = find_base(model, load_tokenizer(job.base))
    rows = RenderedCorpus(tuple(rendered(workload.rows)), (), ())
    # The product's own set-up decides; only its reading of text is replaced, since ids and masks are given.
    given = Prepared(Corpus((), "rows", "rows", ""), Split((), (), ()), rows, None, fit(rows, base.tokenizer))
    with mock.patch.object(run_setup, "prepare", return_value=given):
        setup = set_up(base, None, settings(job, workload))
    lora = lt.attach(setup.model, job.adapter, trainable=True)
    for number in range(1, job.adapters):
        lora.load(job.adapter, f"adapter{number}")
    if setup.decisions["recompute"] == "on":
        recompute_activations(setup.model)
    adapter_training(setup.model)
    return Run(job, setup, lora)


def settings(job: Job, workload: Workload) -> TrainConfig:
    """What all sides have in common; everything else is decided as in every run."""
    return TrainConfig(
        r=job.r,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        lr=job.lr,
        schedule="constant",
        warmup=0,
        clip=job.clip,
        seed=job.seed,
        epochs=1,
        batch_size=workload.batch_size,
        val=0,
        device=job.device,
        samples=0,
        checks="off",
    )


def rendered(rows: Sequence[Row]) -> list[Rendered]:
    return [
        Rendered(tuple(row.ids), tuple(row.supervised), Place("rows", number), truncated=False, characters=len(row.ids))
        for number, row in enumerate(rows, 1)
    ]


def train(job: Job, workload: Workload, clock: Clock) -> None:
    run = prepared(job, workload, clock.loaded)
    optimizer = run.optimizer()
    work = run.work(workload.rows, workload.batch_size) if job.order == "given" else run.work()
    events: list[StepDone] = []

    def hear(event: StepDone) -> None:
        events.append(event)
        clock.step(event.loss)

    clock.begin()
    if workload.warm:
        run.go_through(run.work(workload.warm, workload.batch_size), optimizer, hear)
        events.clear()
    run.go_through(work, optimizer, hear)
    seen = sum(event.examples for event in events)
    assert seen == len(workload.rows), f"{seen} rows were gone through, not {len(workload.rows)}"
    clock.notes["computed_tokens"] = sum(event.computed_tokens for event in events)
    clock.notes["decisions"] = told(run.setup)
    if job.saved:
        run.lora.save(job.saved)
    if job.trace:
        clock.freeze_memory()
        clock.notes["planned"] = planned(run.setup)
        clock.notes["standing"] = standing(run.lora, optimizer)
        one = run.work(workload.rows[: workload.batch_size], workload.batch_size)
        clock.live(lambda: run.go_through(one, optimizer, lambda _: None))


def planned(setup: Setup) -> int:
    """Bytes beyond the base at the peak of a step, as the run's plan says."""
    return setup.memory.total - setup.memory.base


def standing(lora: Adapters, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of adapters and optimizer states, which stay between steps."""
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(tensor.nbytes for tensor in [*lora.parameters(), *states])


def told(setup: Setup) -> dict[str, Any]:
    """The decisions that speed and memory depend on, those there are: their names are the product's."""
    names = ("pack", "share_prefixes", "group_prefixes", "micro_batch_tokens", "recompute", "fused", "dtype")
    return {name: setup.decisions.values[name] for name in names if name in setup.decisions.values}


def gradients(job: Job, workload: Workload) -> dict[str, torch.Tensor]:
    """Of one step over all rows of the workload, by adapter tensor, as they reach the optimizer; no clipping."""
    run = prepared(replace(job, clip=0.0), workload)
    found: dict[str, torch.Tensor] = {}
    named = {
        f"{path}.{letter}": getattr(low_rank, letter)
        for path, low_rank in run.lora.factors().items()
        for letter in ("A", "B")
    }

    class Recorder(torch.optim.SGD):
        def step(self, *_: Any) -> Any:
            found.update({name: parameter.grad.detach().float().cpu() for name, parameter in named.items()})

    optimizer = Recorder(run.lora.parameters(), lr=job.lr)
    run.go_through(run.work(workload.rows, len(workload.rows)), optimizer, lambda _: None)
    return found
