"""Writes the golden folders beside this file with peft 0.21.2: `python -m tests.adapter.goldens.make`.

They are what peft wrote, byte for byte, but for the model card; `test_goldens.py` reads them without peft.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.models import tiny

HERE = Path(__file__).parent
FILES = ("adapter_config.json", "adapter_model.safetensors")

# Folder → (family, what peft's `LoraConfig` is given).
GOLDENS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora_patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "lora_dropout": 0.1,
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
        },
    ),
    "dora": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}),
    "bias_behind_b": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "lora_only"}),
    "every_bias_and_a_norm": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}),
    "norms": ("llama", {"target_modules": r".*layers\.0\.self_attn\.q_proj", "modules_to_save": ["norm"]}),
    "pissa": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "layers_to_transform": [1]}),
    "orthogonal": ("llama", {"target_modules": ["k_proj"], "init_lora_weights": "orthogonal", "bias": "all"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "token_rows": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [40, 3]}),
    "classifier": ("classifier", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
}


def base_of(name: str) -> Any:
    family = GOLDENS[name][0]
    if family != "classifier":
        return tiny(family)
    values: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_labels": 3,
    }
    config = transformers.LlamaConfig(**values, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(config).eval()


def randomise(model: nn.Module) -> None:
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=dice) * 0.3)


def make() -> None:
    import peft

    assert peft.__version__ == "0.21.2", peft.__version__
    for name, (_, settings) in GOLDENS.items():
        torch.manual_seed(0)
        model = peft.get_peft_model(base_of(name), peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **settings}))
        randomise(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            (HERE / name).mkdir(exist_ok=True)
            for file in FILES:
                shutil.copyfile(Path(folder, file), HERE / name / file)


if __name__ == "__main__":
    make()
