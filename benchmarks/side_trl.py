"""TRL's SFTTrainer over peft, on rows that are tokenised already.

`trl`: the defaults (fp32 weights under bf16 autocast, activations recomputed), rows in the given order.
`trl-tuned`: weights and adapters in bf16, nothing recomputed, rows of similar length together; on a CPU the model's own
loss, since without Triton TRL's takes the logits of every position tile by tile, which is slower.
Nothing is cut: TRL's own limit of 1024 tokens would make the longest rows shorter than the other sides'.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from clock import Clock
from job import Job, Workload
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from weights import DTYPES, load_model


@dataclass(frozen=True)
class Warmed:
    """The warm-up's rows first, in their order; then the others, in the trainer's way."""

    warm: int
    then: list[int]

    def __iter__(self) -> Iterator[int]:
        return iter([*range(self.warm), *(self.warm + index for index in self.then)])

    def __len__(self) -> int:
        return self.warm + len(self.then)


class Trainer(trl.SFTTrainer):  # type: ignore[misc]
    sampler: Warmed
    own_loss = False

    def _get_train_sampler(self, *_: Any) -> Any:
        return self.sampler

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        if self.own_loss:
            return transformers.Trainer.compute_loss(self, model, inputs, *given, **named)
        return super().compute_loss(model, inputs, *given, **named)


class Timed(TrainerCallback):
    """Tells the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step()


def train(job: Job, workload: Workload, clock: Clock) -> None:
    tuned = job.side == "trl-tuned"
    datasets.disable_progress_bars()
    # A path given to the trainer would be loaded in fp32 as well.
    model = load_model(job.base, job.dtype if tuned else "fp32", job.device)
    clock.loaded()
    model = peft.PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
    if tuned:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(DTYPES[job.dtype])
    rows = [*workload.warm, *workload.rows]
    data = datasets.Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=arguments(job, workload, folder, tuned=tuned),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(job.base),
            callbacks=[Timed(clock)],
        )
        trainer.own_loss = tuned and not job.device.startswith("cuda")
        trainer.sampler = Warmed(len(workload.warm), _order(workload, job, tuned=tuned))
        trainer.train()
    clock.losses([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def arguments(job: Job, workload: Workload, folder: str, *, tuned: bool) -> Any:
    """Only what makes the work the same as the other sides', and what tuning means."""
    steps = -(-len(workload.warm) // workload.batch_size) - (-len(workload.rows) // workload.batch_size)
    better = {"bf16": False, "gradient_checkpointing": False} if tuned else {}
    return trl.SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=workload.micro_batch,
        gradient_accumulation_steps=workload.batch_size // workload.micro_batch,
        max_steps=steps,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        max_grad_norm=job.clip,
        weight_decay=0.0,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=not job.device.startswith("cuda"),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=job.seed,
        **better,
    )


def _order(workload: Workload, job: Job, *, tuned: bool) -> list[int]:
    """As the trainer's own `group_by_length` draws it."""
    if not tuned or job.order == "given":
        return list(range(len(workload.rows)))
    dice = torch.Generator().manual_seed(job.seed)
    lengths = [len(row.ids) for row in workload.rows]
    return list(LengthGroupedSampler(workload.batch_size, lengths=lengths, generator=dice))
