"""A training loop set up in one call, as the run does it, with everything open to change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import loratune as lt
from loratune.adapt import Adapters
from loratune.data.order import Order
from loratune.data.pack import Layout
from loratune.data.render import Rendered
from loratune.model import use_packed_attention
from loratune.training.loop import Hooks, Loop, Progress, Work
from loratune.training.optimizer import make_optimizer
from loratune.training.processes import Processes
from loratune.training.schedule import Schedule
from tests.models import PAD, VOCABULARY, tiny


@dataclass
class Training:
    """One loop over `rows`, four a step.

    `heard` holds its events, `saved` the steps at which it saved.
    """

    rows: Sequence[Rendered]
    family: str = "llama"
    optimizer: str = "adamw"
    layout: Layout = Layout.PACKED
    limit: int = 2048
    steps: int = 5
    dropout: float = 0.0
    clip: float = 1.0
    lr: float = 1e-2
    weight_decay: float = 0.0
    seed: int = 7
    kind: Any = "linear"
    eval_every: int | None = None
    save_every: int | None = None
    patience: int = 0
    evaluate: Callable[[int], float] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        self.model = tiny(self.family, **self.changes)
        if self.layout is not Layout.PADDED:
            use_packed_attention(self.model)
        torch.manual_seed(self.seed)
        config = lt.LoraConfig(r=4, lora_alpha=8, lora_dropout=self.dropout, target_modules="all-linear")
        self.lora: Adapters = lt.attach(self.model, config)
        groups = self.lora.param_groups(self.lr, weight_decay=self.weight_decay)
        self.updater = make_optimizer(self.optimizer, groups, self.lr)
        self.progress = Progress(0, self.limit)
        self.schedule = Schedule(self.kind, self.lr, self.steps, 1)
        self.order = Order(len(self.rows), 4, self.seed)
        self.heard: list[Any] = []
        self.saved: list[int] = []

    def run(self, until: int | None = None, save: Callable[[Progress], None] | None = None) -> Training:
        """Train to the end, or stop after `until` steps as a signal would."""
        work = Work(
            rows=self.rows,
            order=self.order,
            layout=self.layout,
            pad_id=PAD,
            seed=self.seed,
            clip=self.clip,
            eval_every=self.eval_every,
            save_every=self.save_every,
            patience=self.patience,
            device=torch.device("cpu"),
            choices=VOCABULARY,
        )
        hooks = Hooks(
            self.heard.append,
            self.evaluate,
            save or (lambda progress: self.saved.append(progress.step)),
            lambda: until is not None and self.progress.step >= until,
        )
        self.model.train()
        Loop(self.model, self.lora, work, self.updater, self.schedule, self.processes, self.progress, hooks).run()
        self.model.eval()
        return self

    def steps_heard(self) -> list[Any]:
        return [event for event in self.heard if hasattr(event, "grad_norm")]

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.lora.parameters()]


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], *, rel: float) -> None:
    """Equal tensor by tensor, by norm."""
    for mine, other in zip(ours, theirs, strict=True):
        error = float(
            (mine.detach().double() - other.detach().double()).norm() / other.detach().double().norm().clamp_min(1e-12)
        )
        assert error <= rel, f"{tuple(mine.shape)}: {error:.2e}"


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Equal bit by bit."""
    assert len(ours) == len(theirs)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
