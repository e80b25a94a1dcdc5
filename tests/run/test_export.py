"""Adapters for other readers: what these make of them is what the adapter does (FORMAT)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import loratune as lt
from loratune.adapter import SavedAdapter, read_adapter, read_gguf
from loratune.errors import AdapterFileError, CheckError, ConfigError, ModelError, RunFolderError
from loratune.run.export import export
from tests.models import saved, tiny

IDS = torch.arange(3, 40)[None]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "pissa": {"r": 3, "init_lora_weights": "pissa"},
    "vera": {"peft_type": "VERA", "r": 6},
    "vera from its seed": {"peft_type": "VERA", "r": 6, "save_projection": False, "projection_prng_key": 3},
}


def update_of(adapter: SavedAdapter, path: str, inner: int) -> np.ndarray[Any, Any]:
    """The dense update of a module with so many inputs."""
    if path in adapter.factors:
        factors = adapter.factors[path]
        return np.asarray(factors.B.double() @ factors.A.double() * adapter.scale(path))
    d, b = (adapter.vectors[path][name].double().numpy() for name in "db")
    assert adapter.projections is not None
    A, B = (projection.double().numpy() for projection in adapter.projections)
    return np.asarray((b[:, None] * B[: len(b)]) @ (d[:, None] * A[:, :inner]))


def made(folder: Path, family: str = "llama", **settings: Any) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter of it, and the logits of both together."""
    base = saved(folder / "base", family)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    lora = lt.attach(model, lt.LoraConfig(**{"target_modules": "all-linear", **settings}))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    lora.save(folder / "adapter")
    return base, folder / "adapter", model.eval()(IDS).logits.detach()


@pytest.mark.parametrize("to", ["peft", "vllm"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_it_and_computes_the_same(tmp_path: Path, kind: str, to: str) -> None:
    base, adapter, logits = made(tmp_path, **KINDS[kind])
    found = export(str(adapter), str(tmp_path / "out"), to=to)
    assert "read back" in found["verified"]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")).eval()
    assert torch.allclose(theirs(IDS).logits, logits, atol=2e-5)
    if to == "vllm":
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"]
        assert [config[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora")] == [{}, {}, False]
        assert config["init_lora_weights"] is True
        assert {f.A.shape[0] for f in read_adapter(tmp_path / "out").factors.values()} == {config["r"]}
    assert bool(found["notes"]) == (to == "vllm")


@pytest.mark.parametrize("to", ["peft", "vllm", "gguf"])
def test_nothing_stays_where_another_adapter_is_read_back(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter, _ = made(tmp_path)

    def otherwise(folder: Path) -> SavedAdapter:
        """What was written, with one factor changed on the disk."""
        found = read_adapter(folder)
        return found if folder == adapter else changed(found)

    def changed(found: SavedAdapter) -> SavedAdapter:
        path = next(iter(found.factors))
        factors = found.factors[path]
        return replace(found, factors={**found.factors, path: factors._replace(B=factors.B * 1.5)})

    def gguf(path: Path) -> tuple[Any, dict[str, Any]]:
        said, tensors = read_gguf(path)
        name = next(iter(tensors))
        return said, {**tensors, name: tensors[name] + 1}

    module = sys.modules["loratune.run.export"]  # by this name the package has the function
    monkeypatch.setattr(module, "read_adapter", otherwise)
    monkeypatch.setattr(module, "read_gguf", gguf)
    with pytest.raises(CheckError, match=r"what was read back is .*\nhint: nothing was written"):
        export(str(adapter), str(tmp_path / "out"), to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_rank_that_vllm_must_be_told_of(tmp_path: Path) -> None:
    _, adapter, _ = made(tmp_path, r=24)
    assert (
        "vllm serve … --max-lora-rank 24: its default is 16"
        in export(str(adapter), str(tmp_path / "out"), to="vllm")["notes"]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "phi3"])
def test_gguf_holds_the_update_with_the_rows_where_llama_cpp_has_them(tmp_path: Path, family: str, kind: str) -> None:
    targets = ["qkv_proj", "down_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    settings = {key: value for key, value in KINDS[kind].items() if family != "phi3" or "pattern" not in key}
    base, adapter, _ = made(tmp_path, family, **settings, target_modules=targets)
    found = export(str(adapter), str(tmp_path / "out"), to="gguf")
    said, tensors = read_gguf(Path(found["out"]))
    rank = max(value.shape[0] for name, value in tensors.items() if name.endswith("lora_a"))
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == rank
    assert said["general.architecture"] == {"mistral": "llama", "gemma3": "gemma3"}.get(family, family)
    # Where the seed alone says what A and B are, peft draws them.
    original = read_adapter(adapter) if "seed" not in kind else redrawn(base, adapter)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"qkv_proj": "attn_qkv", "down_proj": "ffn_down"}
    model = AutoModelForCausalLM.from_pretrained(base)
    config = model.config
    assert len(original.modules) == len(tensors) // 2
    for path in original.modules:
        layer, last = path.split(".")[2], path.rpartition(".")[2]
        a, b = (tensors[f"blk.{layer}.{names[last]}.weight.lora_{x}"] for x in "ab")
        # llama.cpp's factor is alpha over the tensor's own rank.
        update = (b.astype(np.float64) @ a.astype(np.float64)) * (said["adapter.lora.alpha"] / a.shape[0])
        expected = update_of(original, path, model.get_submodule(path).in_features)
        if said["general.architecture"] == "llama" and last in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
            dim = expected.shape[0] // heads
            order = [h * dim + half * dim // 2 + i for h in range(heads) for i in range(dim // 2) for half in (0, 1)]
            assert not np.allclose(update, expected)
            expected = expected[order]
        assert np.allclose(update, expected, rtol=1e-5, atol=1e-6)


def redrawn(base: Path, adapter: Path) -> SavedAdapter:
    """The adapter as peft reads it and writes it with its projections."""
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    found = read_adapter(adapter)
    projections = tuple(getattr(theirs.base_model, name)["default"] for name in ("vera_A", "vera_B"))
    return replace(found, projections=projections)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, r"knows no \(IA\)³"),
        ({"peft_type": "VERA", "modules_to_save": ["norm"]}, "in the place of the base's"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "bias behind B"),
        ({"modules_to_save": ["norm"]}, "in the place of the base's"),
        ({"use_dora": True, "modules_to_save": ["norm"]}, "DoRA.*in the place of"),
    ],
    ids=str,
)
@pytest.mark.parametrize("to", ["vllm", "gguf"])
def test_what_a_reader_cannot_hold_is_refused_at_once(
    tmp_path: Path, settings: dict[str, Any], words: str, to: str
) -> None:
    _, adapter, _ = made(tmp_path, target_modules=["q_proj", "v_proj"], **settings)
    with pytest.raises(AdapterFileError, match=f"(?s){words}") as caught:
        export(str(adapter), str(tmp_path / "out"), to=to)
    assert "loratune merge" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("to", ["vllm", "gguf"])
def test_one_that_peft_started_from_a_decomposition_counts_from_a_base_that_no_other_reader_has(
    tmp_path: Path, init: str, to: str
) -> None:
    base = saved(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match=f"it starts from '{init}'") as caught:
        export(str(tmp_path / "adapter"), str(tmp_path / "out"), to=to)
    assert not (tmp_path / "out").exists()
    assert caught.value.hint == "attach it to its base and save it, which writes a plain adapter"
    # What the hint says, done.
    lt.attach(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").save(tmp_path / "plain")
    export(str(tmp_path / "plain"), str(tmp_path / "out"), to=to)
    if to == "vllm":
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")).eval()
        assert torch.allclose(again(IDS).logits, theirs(IDS).logits, atol=2e-5)


def test_a_tied_head_and_families_unknown_to_llama_cpp(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama", tie_word_embeddings=True)
    lora = lt.attach(AutoModelForCausalLM.from_pretrained(base), lt.LoraConfig(target_modules=["lm_head", "q_proj"]))
    lora.save(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="lm_head: it is tied"):
        export(str(tmp_path / "adapter"), str(tmp_path / "out"), to="gguf")
    made(tmp_path / "gpt2", "gpt2")
    with pytest.raises(AdapterFileError, match="no GGUF adapters of 'gpt2'"):
        export(str(tmp_path / "gpt2" / "adapter"), str(tmp_path / "out"), to="gguf")
    assert not (tmp_path / "out").exists()


def test_other_refusals(tmp_path: Path) -> None:
    lt.attach(tiny(), lt.LoraConfig(target_modules=["q_proj"])).save(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="no such reader; did you mean 'gguf'"):
        export(str(tmp_path / "adapter"), str(tmp_path / "out"), to="ggu")
    with pytest.raises(ModelError, match="which base"):
        export(str(tmp_path / "adapter"), str(tmp_path / "out"), to="gguf")
    with pytest.raises(RunFolderError, match="exists already"):
        export(str(tmp_path / "adapter"), str(tmp_path / "adapter"), to="peft")


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("to", ["vllm", "gguf"])
def test_vera_is_written_with_its_own_base_alone(tmp_path: Path, to: str, projected: bool) -> None:
    _, adapter, _ = made(tmp_path, peft_type="VERA", r=4, save_projection=projected)
    wide = saved(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=96)
    with pytest.raises(AdapterFileError, match=r"expected \(64,\)"):
        export(str(adapter), str(tmp_path / "out"), to=to, base=str(wide))
    assert not (tmp_path / "out").exists()
