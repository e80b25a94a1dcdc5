"""A start from data (init "eva"): what the rows of the first steps give each layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from loratune.adapt import Adapters
from loratune.data.batch import Batch
from loratune.data.pack import batches
from loratune.evaluation import held_out_loss
from loratune.run.events import Noticed
from loratune.run.journal import Journal
from loratune.run.record import adapter_facts
from loratune.run.setup import Setup

# Tokens that are looked at; directions have settled long before (arXiv:2410.07170, section 4, takes a few batches).
_TOKENS = 8192


def start_from_data(setup: Setup, lora: Adapters, journal: Journal, *, resume: bool) -> None:
    """Where the adapter starts from data, give it that; every process does the same, with the same rows.

    A run that goes on does it again, so that its ranks are those of its checkpoint.
    """
    if lora.config().init_lora_weights != "eva":
        return

    def forward(batch: Batch) -> None:
        held_out_loss(setup.model, [batch], setup.device)

    lora.initialise(_first_batches(setup), forward=forward, counts=_real)
    plan = lora.plan()
    ranks = [target.r for target in plan.targets]
    journal.record["adapter"] = adapter_facts(plan)
    if resume:
        return
    text = f"A from what the layers are given in the first steps · ranks {min(ranks)} to {max(ranks)}"
    journal.hear(Noticed(0, "start", text))


def _first_batches(setup: Setup) -> Iterator[Batch]:
    tokens = 0
    decisions = setup.decisions
    for step in range(setup.order.steps_per_epoch):
        rows = [setup.prepared.rows[i] for i in setup.order.step(step)]
        yield from batches(rows, decisions.layout, limit=decisions["micro_batch_tokens"], pad_id=setup.base.pad_id)
        tokens += sum(row.needed for row in rows)
        if tokens >= _TOKENS:
            return


def _real(batch: Batch) -> Tensor | None:
    return batch.attention_mask
