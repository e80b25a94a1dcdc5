"""A merged model as one GGUF file, read back by transformers; llama.cpp's own reading is in test_llama_cpp.py."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratune as lt
from loratune.adapter import read_gguf
from loratune.errors import AdapterFileError, CheckError, ConfigError, LoratuneError, ModelError, RunFolderError
from loratune.run.export import export
from loratune.run.merge import merge
from loratune.run.opened import open_run
from tests.models import saved

IDS = torch.arange(3, 40)[None]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # another one is not read by transformers
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def made(folder: Path, family: str = "llama", config: dict[str, Any] | None = None, **settings: Any) -> str:
    """A base and an adapter that changes it much; the adapter's folder."""
    base = saved(folder / "base", family, **(config or {}))
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": "all-linear", **settings}
    lora = lt.attach(AutoModelForCausalLM.from_pretrained(base), lt.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    lora.save(folder / "adapter")
    return str(folder / "adapter")


def whole(run: str, out: Path, **settings: Any) -> dict[str, Any]:
    return export(run, str(out), to="gguf", merged=True, **settings)


def read(folder: Path, dtype: torch.dtype, **where: Any) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where).eval()(IDS).logits.detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_it_and_computes_the_same(tmp_path: Path, family: str, dtype: str) -> None:
    adapter = made(tmp_path, family, FAMILIES[family])
    found = whole(adapter, tmp_path / "out", dtype=dtype)
    assert found["notes"] == []
    assert "merged ≡ adapter" in found["verified"]
    # What merge writes, rounded once more for fp16, which it does not write.
    merge(open_run(adapter, dtype="fp32" if dtype == "fp16" else dtype), str(tmp_path / "merged"))
    expected = read(tmp_path / "merged", DTYPES[dtype])
    assert torch.equal(read(tmp_path / "out", DTYPES[dtype], gguf_file="model.gguf"), expected)
    assert not torch.allclose(read(tmp_path / "base", DTYPES[dtype]), expected, atol=0.5)


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    whole(str(saved(tmp_path / "base")), tmp_path / "out")
    there = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    here = AutoTokenizer.from_pretrained(tmp_path / "base")
    text = "<|im_start|>user\nNaïve café, 北京: 21 degrees?<|im_end|>\n"
    assert there(text)["input_ids"] == here(text)["input_ids"]
    for name in ("chat_template", "bos_token", "eos_token", "pad_token"):
        assert getattr(there, name) == getattr(here, name)


@pytest.mark.parametrize("kept", ["fp32", "bf16"])
def test_it_is_kept_as_the_base_is(tmp_path: Path, kept: str) -> None:
    base = saved(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).to(DTYPES[kept]).save_pretrained(base)
    found = whole(str(base), tmp_path / "out")
    assert found["verified"] == "read back, 21 tensors equal"  # nothing was merged
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(found["out"]).tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == {"fp32": "F32", "bf16": "BF16"}[kept]
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"


def test_what_the_file_says_of_the_model(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 250_000.0}
    base = saved(tmp_path / "base", rope_parameters=rope, rms_norm_eps=3e-6, tie_word_embeddings=True, vocab_size=410)
    said, tensors = read_gguf(Path(whole(str(base), tmp_path / "out", dtype="fp16")["out"]))
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 250_000.0,
        "llama.vocab_size": 410,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {name: said[name] for name in expected} == expected
    assert said["llama.attention.layer_norm_rms_epsilon"] == np.float32(3e-6)
    assert len(said["tokenizer.ggml.tokens"]) == len(said["tokenizer.ggml.token_type"]) == 410
    # llama.cpp takes the embedding for a head that is not there.
    assert "output.weight" not in tensors


def test_one_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[np.ndarray[Any, Any]]] = []
    most = 0
    write = gguf.GGUFWriter.write_tensor_data

    def counted(self: Any, tensor: np.ndarray[Any, Any], *args: Any) -> None:
        nonlocal most
        alive.append(weakref.ref(tensor))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        write(self, tensor, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", counted)
    whole(made(tmp_path), tmp_path / "out", dtype="fp16")
    assert len(alive) == 21
    # This one and the one that the loop has not let go of yet.
    assert most <= 2


def spoilt(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The tensor of this number is written with one bit changed."""
    write, count = gguf.GGUFWriter.write_tensor_data, iter(range(1000))

    def writing(self: Any, tensor: np.ndarray[Any, Any], *args: Any) -> None:
        if next(count) == number:
            tensor = tensor.copy()
            tensor.reshape(-1).view(np.uint8)[0] ^= 1
        write(self, tensor, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", writing)


def test_a_bit_that_is_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, 7)
    with pytest.raises(CheckError, match=r"\.weight: what was read back is another tensor"):
        whole(made(tmp_path), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_value_that_fp16_does_not_hold(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 70_000
    model.save_pretrained(base)
    with pytest.raises(
        CheckError, match=r"layers\.1\.mlp\.up_proj\.weight: NaN or infinity in torch.float16"
    ) as caught:
        whole(str(base), tmp_path / "out", dtype="fp16")
    assert "bf16" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert whole(str(base), tmp_path / "out", dtype="bf16")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    adapter = made(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.gguf").write_bytes(b"mine")
    with pytest.raises(RunFolderError, match="exists already"):
        whole(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"to": "vllm", "merged": True}, ConfigError, "only gguf holds whole models"),
        ({"to": "gguf", "dtype": "fp16"}, ConfigError, "of a merged model"),
        ({"to": "gguf", "any_tokenizer": True}, ConfigError, "of a merged model"),
        ({"to": "gguf", "merged": True, "dtype": "f16"}, ConfigError, "no such format; did you mean 'fp16'"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, settings: dict[str, Any], kind: type[LoratuneError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        export(str(tmp_path / "adapter"), str(tmp_path / "out"), **settings)


def test_families_that_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "gemma3")
    for path in base.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match="no GGUF models of 'gemma3_text'") as caught:
        whole(str(base), tmp_path / "out")
    assert "llama, mistral, qwen2, qwen3" in caught.value.hint


def test_a_run_without_an_adapter_yet(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="without an adapter yet"):
        whole(str(tmp_path / "run"), tmp_path / "out")
