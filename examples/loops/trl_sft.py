"""TRL's SFTTrainer, without a `peft_config`: the model it is given has its adapter.

python trl_sft.py MODEL OUT
"""

from __future__ import annotations

import sys

import sums
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import loratune as lt
from loratune.compat.trainer import AdapterTraining


class AdapterSFTTrainer(AdapterTraining, SFTTrainer):
    """TRL's trainer, with checkpoints that hold the adapter and not the base."""


name, out = sys.argv[1:]
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(name)
lora = lt.attach(model, lt.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

arguments = SFTConfig(
    output_dir=f"{out}/checkpoints",
    max_steps=24,
    learning_rate=5e-3,
    per_device_train_batch_size=8,
    bf16=True,
    use_cpu=not torch.cuda.is_available(),
    logging_steps=1,
    report_to=[],
)
trainer = AdapterSFTTrainer(model, arguments, train_dataset=Dataset.from_list(sums.ROWS), processing_class=tokenizer)
trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
lora.save(out, tokenizer=tokenizer)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {out} holds the adapter")
