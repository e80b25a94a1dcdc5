"""peft in a loop of one's own.

`peft`: as its documentation has it: fp32 adapters on the base, padded batches in the given order, the model's loss.
`peft-best`: all we know to make it fast: adapters in the base's dtype, rows of similar length together, logits of
scored positions only, cross-entropy in fp32, the fused optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F
from clock import Clock
from job import IGNORED, Job, Row, Workload, by_length, in_batches
from torch import Tensor
from weights import DTYPES, load_model


def adapted(job: Job, model: Any) -> Any:
    """The base with the saved adapter, trainable."""
    found = peft.PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
    for number in range(1, job.adapters):
        found.load_adapter(job.adapter, f"adapter{number}")
    if job.side == "peft-best":
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(DTYPES[job.dtype])
    return found.train()


def train(job: Job, workload: Workload, clock: Clock) -> None:
    model = load_model(job.base, job.dtype, job.device)
    clock.loaded()
    model = adapted(job, model)
    fused = {"fused": True} if job.side == "peft-best" else {}
    optimizer = torch.optim.AdamW(_trainable(model), lr=job.lr, weight_decay=0.0, **fused)
    own = by_length(workload.rows, workload.batch_size, job.seed)
    given = in_batches(workload.rows, workload.batch_size)
    steps = own if job.side == "peft-best" and job.order == "own" else given
    clock.begin()
    for rows in [*in_batches(workload.warm, workload.batch_size), *steps]:
        clock.step(_step(job, model, optimizer, rows, workload.micro_batch))
    if job.saved:
        model.save_pretrained(job.saved)
    if job.trace:
        clock.freeze_memory()
        clock.live(lambda: _step(job, model, optimizer, given[0], workload.micro_batch))


def gradients(job: Job, workload: Workload) -> dict[str, Tensor]:
    """Of one step over all rows of the workload, by adapter tensor; no clipping."""
    model = adapted(job, load_model(job.base, job.dtype, job.device))
    accumulate(job, model, workload.rows, workload.micro_batch)
    return named_gradients(model)


def named_gradients(model: Any) -> dict[str, Tensor]:
    """`layer.A` and `layer.B`, without peft's prefix and the adapter's name."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{path}.{rest[0]}"] = parameter.grad.detach().float().cpu()
    return found


def _step(job: Job, model: Any, optimizer: torch.optim.Optimizer, rows: Sequence[Row], micro_batch: int) -> float:
    loss = accumulate(job, model, rows, micro_batch)
    torch.nn.utils.clip_grad_norm_(_trainable(model), job.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def accumulate(job: Job, model: Any, rows: Sequence[Row], micro_batch: int) -> float:
    """Gradients of the step's loss: the mean over its supervised tokens, whatever its micro-batches."""
    supervised = sum(row.targets for row in rows)
    ordered = sorted(rows, key=lambda row: -len(row.ids)) if job.side == "peft-best" else rows
    total = torch.zeros((), device=job.device)
    for part in in_batches(ordered, micro_batch):
        batch = padded(part, job.device)
        if job.side == "peft-best":
            loss = _scored_only(model, batch) / supervised
        else:
            loss = model(**batch).loss * (sum(row.targets for row in part) / supervised)
        loss.backward()
        total += loss.detach()
    return float(total)


def _scored_only(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The sum over the scored positions of the batch; the head sees no others.

    `logits_to_keep` takes positions for all rows of a batch at once, so that a padded batch would compute more than
    is scored; the body and the head called one after the other compute exactly those.
    """
    causal = model.get_base_model()
    mask = batch["attention_mask"]
    whole = bool(mask.all())  # without pads the kernel for causal attention needs no mask
    hidden = causal.model(batch["input_ids"], attention_mask=None if whole else mask, use_cache=False).last_hidden_state
    targets = batch["labels"][:, 1:]
    scored = targets != IGNORED
    logits = causal.lm_head(hidden[:, :-1][scored])
    return F.cross_entropy(logits.float(), targets[scored], reduction="sum")


def padded(rows: Sequence[Row], device: str) -> dict[str, Tensor]:
    longest = max(len(row.ids) for row in rows)

    def filled(values: list[int], value: int) -> list[int]:
        return values + [value] * (longest - len(values))

    batch = {
        "input_ids": [filled(row.ids, 0) for row in rows],
        "attention_mask": [filled([1] * len(row.ids), 0) for row in rows],
        "labels": [filled(row.labels, IGNORED) for row in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def _trainable(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
