"""Plans of models whose figures are known, from their configs alone: no weights are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from loratune.errors import ConfigError
from loratune.run.look import look_at_plan

GB = 1e9

# Widths as published, with the number of parameters that they make.
KNOWN: dict[str, tuple[PretrainedConfig, int]] = {
    "gpt2": (GPT2Config(), 124_439_808),
    "llama-2-7b": (LlamaConfig(intermediate_size=11008), 6_738_415_616),
    "llama-2-70b": (
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        ),
        68_976_648_192,
    ),
    "gpt3-175b": (GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048), 174_604_259_328),
}


def planned(folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    config, _ = KNOWN[name]
    config.architectures = ["GPT2LMHeadModel" if name.startswith("gpt") else "LlamaForCausalLM"]
    config.save_pretrained(folder)
    return look_at_plan(str(folder), dtype="bf16", **settings)


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_weights(tmp_path: Path, name: str) -> None:
    found, parameters = planned(tmp_path, name), KNOWN[name][1]
    assert found["base_parameters"] == parameters
    assert found["memory"]["base"] == 2 * parameters
    full = found["methods"]["full"]
    # fp32 masters and gradients, and Adam's two moments, beside the base in two bytes.
    assert full["adapter"] == 16 * parameters
    assert full["total"] > 18 * parameters


def test_gpt2_small(tmp_path: Path) -> None:
    """About 250 MB in two bytes, over a gigabyte for Adam, single megabytes for an adapter, a quarter in four bits."""
    found = planned(tmp_path, "gpt2", r=8, target_modules=("c_attn",))
    memory, methods = found["memory"], found["methods"]
    assert memory["base"] == pytest.approx(250e6, rel=0.01)
    assert methods["full"]["optimizer"] + methods["full"]["masters"] > 1e9
    # 12 layers of rank 8 on 768 × 2304.
    assert found["adapter"]["trainable"] == 12 * 8 * (768 + 2304) == 294_912
    assert memory["adapter"] < 10e6
    # What is kept in four bits takes a quarter; embeddings, norms and biases stay as they are.
    linears = 12 * 12 * 768 * 768
    bits = methods["qlora"]["base"] + methods["qlora"]["constants"] - (memory["base"] - 2 * linears)
    assert bits / (2 * linears) == pytest.approx(0.25, abs=0.02)


def test_llama_7b(tmp_path: Path) -> None:
    """13.5 GB in bf16; about 3.9 in four bits, of which the two embeddings in bf16 are half a gigabyte."""
    found = planned(tmp_path, "llama-2-7b", r=16, target_modules=("q_proj", "v_proj"), batch_size=1)
    assert found["memory"]["base"] == pytest.approx(13.48 * GB, rel=1e-3)
    assert found["adapter"]["trainable"] == 32 * 2 * 16 * (4096 + 4096) == 8_388_608
    qlora = found["methods"]["qlora"]
    # QLoRA's section 3: with double quantisation the constants are 0.127 bits a weight.
    linears = KNOWN["llama-2-7b"][1] - 2 * 32000 * 4096 - 65 * 4096
    assert qlora["constants"] * 8 / linears == pytest.approx(0.127, abs=0.001)
    assert qlora["base"] == linears // 2 + 2 * (2 * 32000 * 4096 + 65 * 4096)


def test_llama_70b_in_four_bits_fits_two_cards_of_24(tmp_path: Path) -> None:
    found = planned(tmp_path, "llama-2-70b", method="qlora", r=16, batch_size=1, recompute="on")
    assert 35 * GB < found["memory"]["total"] < 48 * GB
    assert found["methods"]["full"]["total"] > 1200 * GB


def test_llama_70b_in_eight_parts_fits_cards_of_24(tmp_path: Path) -> None:
    found = planned(tmp_path, "llama-2-70b", r=16, batch_size=1, recompute="on")
    assert found["memory"]["total"] > 138 * GB
    assert 138 * GB / 8 < found["sharded"]["8"] < 24 * GB


def test_gpt3(tmp_path: Path) -> None:
    """Hu et al. (arXiv:2106.09685), section 4.2 and table 4: rank 1 on queries and values is 4.7 M parameters, rank 4 a
    checkpoint of 35 MB instead of 350 GB."""
    found = planned(tmp_path, "gpt3-175b", r=1, target_modules=("c_attn",))
    assert found["adapter"]["trainable"] == pytest.approx(4.7e6, rel=0.01)
    assert found["memory"]["base"] == pytest.approx(350 * GB, rel=0.01)
    four = planned(tmp_path, "gpt3-175b", r=4, target_modules=("c_attn",))
    assert 2 * four["adapter"]["trainable"] == pytest.approx(35 * 2**20, rel=0.05)


def test_moments_in_eight_bits(tmp_path: Path) -> None:
    plain, eight = (planned(tmp_path, "gpt2", optimizer=name, device="cuda") for name in ("adamw", "adamw_8bit"))
    # A byte in place of four, and a scale of four bytes for 256 of them; none of these matrices is below 4,096 values.
    assert eight["memory"]["optimizer"] * 4 * 64 == plain["memory"]["optimizer"] * 65
    here = planned(tmp_path, "gpt2", optimizer="adamw_8bit", device="cpu")
    assert here["memory"]["optimizer"] == plain["memory"]["optimizer"]
    assert any("adamw_8bit has kernels for CUDA only, and this is cpu" in line for line in here["decisions"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant": "nf4", "device": "hpu"}, r"quant='nf4' on 'hpu'.*cpu, cuda, mps, xpu"),
        ({"method": "full", "quant": "int8"}, "cannot be trained"),
        ({"device": "toaster"}, "toaster"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        look_at_plan("nowhere", **settings)
