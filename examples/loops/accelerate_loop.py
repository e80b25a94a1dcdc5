"""A loop of your own with Accelerate: `accelerate launch accelerate_loop.py MODEL OUT` on as many devices as there are.

python accelerate_loop.py MODEL OUT [BACKEND of torch.compile]
"""

from __future__ import annotations

import sys

import sums
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import loratune as lt

name, out, *backend = sys.argv[1:]
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").train()
tokenizer = AutoTokenizer.from_pretrained(name)
lora = lt.attach(model, lt.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
model.gradient_checkpointing_enable({"use_reentrant": False})

rows = sums.tokenized(tokenizer)
collate = DataCollatorForSeq2Seq(tokenizer)
accelerator = Accelerator(gradient_accumulation_steps=2, dynamo_backend=backend[0] if backend else None)
trained, optimizer, batches = accelerator.prepare(
    model,
    torch.optim.AdamW(lora.param_groups(lr=5e-3, lora_plus_ratio=4)),
    DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate),
)
losses = []
for _ in range(6):
    for batch in batches:
        with accelerator.accumulate(trained):
            loss = trained(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(lora.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

if accelerator.is_main_process:
    lora.save(out, tokenizer=tokenizer)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {out} holds the adapter")
