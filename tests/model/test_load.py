"""A base from a folder: frozen, complete, finite, known by its fingerprint; or refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.errors import LoratuneError, ModelError
from loratune.model import (
    base_of,
    context_of,
    empty_model,
    find_base,
    fingerprint,
    load_base,
    load_tokenizer,
    recompute_activations,
    stop_ids,
    tokenizer_hashes,
)
from loratune.model.given import given_back
from tests.models import EOS, saved, tiny
from tests.tiny import LLAMA3, tiny_tokenizer

IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refused(name: Any) -> str:
    with pytest.raises(LoratuneError) as caught:
        find_base(name, dtype="fp32", device="cpu")
    assert type(caught.value) is ModelError
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("wanted", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_folder(wanted: str, dtype: torch.dtype, folder: Path) -> None:
    base = load_base(str(folder), dtype=wanted, device="cpu")
    assert (base.name, base.source, base.revision) == (str(folder), "folder", None)
    assert base.precision.dtype == base.model.dtype == dtype
    assert base.precision.reason == "given"
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.name_or_path == str(folder)
    expected = tiny().to(dtype).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.model.state_dict().items())
    assert base.tokenizer.chat_template


def test_automatic_dtype_has_a_reason(folder: Path) -> None:
    base = load_base(str(folder), device="cpu")
    assert base.model.dtype in (torch.float32, torch.bfloat16)
    assert "fast bf16" in base.precision.reason


def test_loaded_model_is_a_base() -> None:
    model, tokenizer = tiny(), tiny_tokenizer()
    base = find_base(model, tokenizer)
    assert base.model is model
    assert base.tokenizer is tokenizer
    assert base.source == "memory"


def test_tokenizer_of_a_loaded_model_is_found_by_its_name(folder: Path) -> None:
    model = tiny()
    model.name_or_path = str(folder)
    assert base_of(model).tokenizer.chat_template == tiny_tokenizer().chat_template


# -- fingerprints ------------------------------------------------------------------------------------------------


def test_fingerprint_knows_a_base_in_any_dtype(folder: Path, tmp_path: Path) -> None:
    prints = {dtype: load_base(str(folder), dtype=dtype, device="cpu").fingerprint for dtype in ("fp32", "bf16")}
    assert prints["fp32"] == prints["bf16"] == fingerprint(tiny().named_parameters())
    other = saved(tmp_path / "other", seed=1)
    assert load_base(str(other), dtype="fp32", device="cpu").fingerprint != prints["fp32"]


@pytest.mark.parametrize("change", ["value", "name", "shape", "order of values"])
def test_fingerprint_sees(change: str) -> None:
    weight = torch.arange(12.0).view(3, 4)
    changed = {
        "value": ("w", weight + torch.eye(3, 4)),
        "name": ("v", weight),
        "shape": ("w", weight.view(4, 3)),
        "order of values": ("w", weight.flip(0)),
    }[change]
    assert fingerprint([changed]) != fingerprint([("w", weight)])
    assert fingerprint([("w", weight.clone())]) == fingerprint([("w", weight)])


def test_every_broken_tensor_is_named() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan")])
    with pytest.raises(ModelError) as caught:
        fingerprint([("a", good), ("b", bad), ("c", torch.tensor([float("-inf")]))])
    assert caught.value.problems == ("b: holds NaN or infinity", "c: holds NaN or infinity")


def test_nan_outside_the_sample_is_seen() -> None:
    weight = torch.ones(100_000)
    weight[12_345] = float("nan")
    with pytest.raises(ModelError):
        fingerprint([("w", weight)])


# -- refusals ----------------------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such model folder" in refused(str(tmp_path / "nowhere"))
    assert "no such model folder" in refused("./nowhere")
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "no such model folder" in refused(str(tmp_path / "model.bin"))
    assert "no such file" in refused(str(tmp_path / "nowhere.gguf"))


def test_unknown_hub_id_offline() -> None:
    text = refused("nobody/no-such-model")
    assert "nobody/no-such-model: no such folder, and not all of it is in the cache" in text
    assert "hub id, a folder or a .gguf file" in text


def test_folder_without_a_config(tmp_path: Path) -> None:
    assert "holds no config.json" in refused(str(tmp_path))


def test_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it holds an adapter: name its base model instead" in refused(str(tmp_path))


def test_missing_weight_is_not_drawn_at_random(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    text = refused(str(copy))
    assert "model.layers.1.mlp.up_proj.weight is missing in its files" in text
    assert "model.layers.0.self_attn.q_proj.weight is missing" in text


def test_weight_of_another_shape(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(63, 32)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight is (63, 32) in its files, (64, 32) by its config" in refused(str(copy))


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(str(copy))


def test_damaged_weights(copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "cannot be loaded" in refused(str(copy))


def test_nan_weights(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][5, 5] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight: holds NaN or infinity" in refused(str(copy))


@pytest.mark.parametrize(
    "content", [{"model_type": "nonsense", "architectures": ["NonsenseForCausalLM"]}, {}, {"model_type": "vit"}]
)
def test_unsupported_architecture(content: dict[str, Any], copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps(content))
    text = refused(str(copy))
    assert "cannot be loaded" in text
    assert "supported architecture" in text


def test_broken_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "cannot be loaded" in refused(str(copy))


def test_remote_code_is_not_run(copy: Path) -> None:
    """A folder may name Python files of its own; they are never imported."""
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    mark = copy.parent / "was-run"
    (copy / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    refused(str(copy))
    assert not mark.exists()


def test_something_that_is_no_model() -> None:
    assert "a int is no model" in refused(3)
    assert "a Linear is no model" in refused(torch.nn.Linear(2, 2))


# -- what is beside the weights ----------------------------------------------------------------------------------


def test_empty_model_reads_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    model = empty_model(str(copy))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in tiny().parameters()]


def test_tokenizer_hashes(folder: Path) -> None:
    vocabulary, template = tokenizer_hashes(load_tokenizer(str(folder)))
    assert (vocabulary, template) == tokenizer_hashes(tiny_tokenizer())
    assert tokenizer_hashes(tiny_tokenizer(LLAMA3))[0] == vocabulary
    assert tokenizer_hashes(tiny_tokenizer(LLAMA3))[1] != template
    assert tokenizer_hashes(tiny_tokenizer(eos="<|endoftext|>"))[0] != vocabulary
    assert tokenizer_hashes(tiny_tokenizer(vocabulary=390))[0] != vocabulary
    assert tokenizer_hashes(tiny_tokenizer(None))[1] != template


def test_stop_ids() -> None:
    model = tiny()
    model.generation_config.eos_token_id = [7, 9]
    assert stop_ids(model, tiny_tokenizer()) == {7, 9, EOS}
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tiny_tokenizer(eos=None)) == frozenset()


def test_context() -> None:
    assert context_of(tiny()) == context_of(tiny("gpt2")) == 128


def test_recomputation_gives_the_same_gradients() -> None:
    plain, recomputing = tiny().requires_grad_(True).train(), tiny().requires_grad_(True).train()
    recompute_activations(recomputing)
    for model in (plain, recomputing):
        model(input_ids=IDS).logits.square().sum().backward()
    for mine, theirs in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def test_recomputation_is_undone_only_where_it_was_off() -> None:
    model = tiny()
    for on_before in (False, True):
        if on_before:
            recompute_activations(model)
        with given_back(model):
            recompute_activations(model)
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == on_before


def test_a_call_of_the_tokenizer_leaves_its_hash_alone() -> None:
    """Sentence encoders' files have truncation and padding, which every call sets anew."""
    made = tiny_tokenizer(None)
    plain = tokenizer_hashes(made)
    made.backend_tokenizer.enable_truncation(16)
    made.backend_tokenizer.enable_padding(pad_id=2, pad_token="<|endoftext|>", length=16)
    assert tokenizer_hashes(made) == plain
    made("a text")
    assert tokenizer_hashes(made) == plain
    assert tokenizer_hashes(tiny_tokenizer(None, vocabulary=390)) != plain
