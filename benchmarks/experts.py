"""What low-rank terms on stacked experts cost, beside the base alone and peft.

python benchmarks/experts.py                      print the table, write benchmarks/results/experts.json
python benchmarks/experts.py --repeats 9 --json elsewhere.json

Of a forward and a backward pass the CPU time, and what is kept between them beside the parameters. Before anything is
timed, peft's model and ours must compute the same logits from one adapter folder that peft wrote.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it once
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peft
import torch
import transformers
from measuring import surroundings
from torch import Tensor

import loratune as lt

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "experts.json"
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SIDES, WAYS = ("base", "loratune", "peft"), ("eager", "grouped_mm")
IDS = torch.arange(2 * 64).view(2, 64) * 17 % 100


def small(way: str) -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=100, hidden_size=512, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=64, num_experts_per_tok=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).requires_grad_(False)
    model.set_experts_implementation(way)
    return model


def adapted(side: str, way: str, folder: Path) -> Any:
    model = small(way)
    if side == "peft":
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).train()
    if side == "loratune":
        lt.attach(model, folder, trainable=True)
    else:  # something has to want a gradient
        model.get_input_embeddings().requires_grad_(True)
    return model.train()


def written_by_peft(folder: Path) -> None:
    config = peft.LoraConfig(r=8, target_modules=[], target_parameters=PARAMETERS, init_lora_weights=False)
    peft.get_peft_model(small("eager"), config).save_pretrained(folder)


def kept(model: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(IDS).logits.square().mean()
    loss.backward()
    return sum(found.values())


def step(model: Any) -> float:
    begun = time.process_time()
    model(IDS).logits.square().mean().backward()
    return time.process_time() - begun


def measure(repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written_by_peft(folder)
        for way in WAYS:
            models = {side: adapted(side, way, folder) for side in SIDES}
            ours, theirs = (models[side](IDS).logits.detach() for side in ("loratune", "peft"))
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5, "they compute something else"
            memory = {side: kept(model) for side, model in models.items()}
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(repeats):  # in turn, so that what else the machine does meets all of them
                for side, model in models.items():
                    times[side].append(step(model))
            found[way] = {
                side: {"seconds": statistics.median(times[side]), "samples": times[side], "kept_bytes": memory[side]}
                for side in SIDES
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = measure(options.repeats)
    for way, sides in found.items():
        for side, each in sides.items():
            print(f"{way:<12}{side:<10}{each['seconds'] * 1e3:>8,.0f} ms {each['kept_bytes'] / 2**20:>8,.1f} MiB kept")
    about = surroundings("peft", "torch", "transformers")
    options.json.write_text(json.dumps({**about, "ways": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
