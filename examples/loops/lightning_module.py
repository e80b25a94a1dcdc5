"""Lightning: a module around the adapted model, whose checkpoints hold what trains and nothing else.

python lightning_module.py MODEL OUT [CHECKPOINT]
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import sums
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import loratune as lt

name, out, *checkpoint = sys.argv[1:]
lightning.seed_everything(0)
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").train()
tokenizer = AutoTokenizer.from_pretrained(name)
lora = lt.attach(model, lt.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
losses: list[float] = []


class Adapted(lightning.LightningModule):
    """Trains the adapter of `model`."""

    strict_loading = False  # its checkpoints lack the base

    def __init__(self) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lora.param_groups(lr=5e-3))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in trained}


batches = DataLoader(
    sums.tokenized(tokenizer), batch_size=8, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer)
)
trainer = lightning.Trainer(
    max_epochs=6,
    accelerator="auto",
    default_root_dir=out,
    logger=False,
    callbacks=[ModelCheckpoint(f"{out}/checkpoints", every_n_epochs=3, save_top_k=-1)],
)
trainer.fit(Adapted(), batches, ckpt_path=checkpoint[0] if checkpoint else None)

lora.save(out, tokenizer=tokenizer)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {out} holds the adapter")
