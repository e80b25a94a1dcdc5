"""transformers' Trainer: evaluation, checkpoints of the adapter alone, the best of them at the end.

python hf_trainer.py MODEL OUT [--compile BACKEND] [--quantize nf4] [--resume] [--steps N]
"""

from __future__ import annotations

import argparse

import sums
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

import loratune as lt
from loratune.compat.trainer import AdapterTraining


class AdapterTrainer(AdapterTraining, Trainer):
    """The Trainer, with checkpoints that hold the adapter and not the base."""


parser = argparse.ArgumentParser()
parser.add_argument("model", help="a folder or a hub id")
parser.add_argument("out")
parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile: inductor, aot_eager, eager")
parser.add_argument("--quantize", metavar="FORMAT", help="keep the base in few bits: nf4 or int8")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT/checkpoints")
parser.add_argument("--steps", type=int, default=32)
asked = parser.parse_args()

set_seed(0)
model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(asked.model)
if asked.quantize:
    lt.quantize(model, asked.quantize)
lora = lt.attach(model, lt.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
print(lora.summary())

rows = sums.tokenized(tokenizer)
arguments = TrainingArguments(
    output_dir=f"{asked.out}/checkpoints",
    max_steps=asked.steps,
    learning_rate=5e-3,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    gradient_checkpointing=True,
    torch_compile=asked.compile is not None,
    torch_compile_backend=asked.compile,
    eval_strategy="steps",
    save_strategy="steps",
    eval_steps=8,
    save_steps=8,
    logging_steps=1,
    load_best_model_at_end=True,
    report_to=[],
)
trainer = AdapterTrainer(
    model, arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows[8:], eval_dataset=rows[:8]
)
trainer.train(resume_from_checkpoint=asked.resume)

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
lora.save(asked.out, tokenizer=tokenizer)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {asked.out} holds the adapter")
