"""TRL's DPOTrainer: the reference is the same model without its adapter, and no second one is loaded.

python trl_dpo.py MODEL OUT
"""

from __future__ import annotations

import sys

import sums
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

import loratune as lt
from loratune.compat.trainer import AdapterTraining


class AdapterDPOTrainer(AdapterTraining, DPOTrainer):
    """TRL's trainer, with checkpoints that hold the adapter and not the base."""


name, out = sys.argv[1:]
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(name)
lora = lt.attach(model, lt.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

arguments = DPOConfig(
    output_dir=f"{out}/checkpoints",
    max_steps=12,
    learning_rate=5e-3,
    per_device_train_batch_size=4,
    beta=0.1,
    bf16=False,
    logging_steps=1,
    report_to=[],
)
trainer = AdapterDPOTrainer(
    model,
    ref_model=lora.reference(),
    args=arguments,
    train_dataset=Dataset.from_list(sums.PREFERENCES),
    processing_class=tokenizer,
)
trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
lora.save(out, tokenizer=tokenizer)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {out} holds the adapter")
