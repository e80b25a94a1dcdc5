"""Scripts written for peft give the same with `loratune.compat.peft` in the import line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.adapter.cases import gap, logits
from tests.compat.twin import adapter, both
from tests.models import saved

SKETCH = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

tokenizer = AutoTokenizer.from_pretrained(base, use_fast=True)
model = AutoModelForCausalLM.from_pretrained(base)
before = model(IDS).logits.detach()
model = get_peft_model(
    model,
    LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, bias="none", task_type=TaskType.CAUSAL_LM
    ),
)
model.print_trainable_parameters()
at_start = model.eval()(IDS).logits.detach()

model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(5):
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.save_pretrained(folder)
trained = model.eval()(IDS).logits.detach()

again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
loaded = again(IDS).logits.detach()
words = again.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
name = type(model).__name__
"""


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ["c_attn", "c_proj"]), ("llama", {"q_proj", "v_proj"})])
def test_sketch(tmp_path: Path, family: str, targets: Any) -> None:
    base = saved(tmp_path / "base", family)
    theirs, ours = both(SKETCH, base=str(base), targets=targets, folder=str(tmp_path / "adapter"))
    assert ours.printed == theirs.printed
    assert "trainable params:" in ours.printed
    assert ours.name == theirs.name == "PeftModelForCausalLM"
    assert torch.equal(ours.at_start, ours.before)
    assert ours.losses[-1] < ours.losses[0]
    assert gap(ours.trained, ours.before) > 0.01
    assert torch.equal(ours.loaded, ours.trained)
    assert ours.words.shape == theirs.words.shape
    assert not any(p.requires_grad for p in ours.again.parameters())
    assert not ours.again.training


def test_files_are_where_pefts_are_with_the_same_keys(tmp_path: Path) -> None:
    script = """
from peft import LoraConfig, get_peft_model
config = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
model = get_peft_model(tiny("gpt2"), config)
model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn", "c_fc"]))
model.save_pretrained(folder / __name__)
model.save_pretrained(folder / __name__ / "one", selected_adapters=["second"])
"""
    both(script.replace("__name__", "(get_peft_model.__module__.split('.')[0])"), folder=tmp_path)
    files = {
        library: {
            str(path.relative_to(tmp_path / library)): sorted(load_file(path))
            for path in (tmp_path / library).rglob("*.safetensors")
        }
        for library in ("peft", "loratune")
    }
    assert files["loratune"] == files["peft"]
    assert set(files["peft"]) == {f"{where}adapter_model.safetensors" for where in ("", "second/", "one/second/")}
    first = json.loads((tmp_path / "loratune" / "adapter_config.json").read_text())
    assert first["lora_alpha"] == 8


LOADED = """
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
model = PeftModel.from_pretrained(tiny(family), folder)
out = model(IDS).logits.detach()
counts = model.get_nb_trainable_parameters()
config_names = list(model.peft_config), model.peft_config["default"].inference_mode, model.active_peft_config.r
nested = {}
with model.disable_adapter():
    with model.disable_adapter():
        nested["inner"] = model(IDS).logits.detach()
    nested["between"] = model(IDS).logits.detach()
    names_inside = model.active_adapters
nested["after"] = model(IDS).logits.detach()
parameters = len(list(model.parameters()))
state = get_peft_model_state_dict(model)
config = PeftConfig.from_pretrained(folder)
facts = (config.r, config.lora_alpha, config.task_type, config.inference_mode, config.peft_type)
still = model.get_nb_trainable_parameters()
active = (model.active_adapter, model.active_adapters)
prefix = {name.split(".")[0] + "." + name.split(".")[1] for name, _ in model.named_parameters()}
base = (model.get_base_model() is model.base_model.model, model.model is model.get_base_model())
trainable = PeftModel.from_pretrained(tiny(family), folder, adapter_name="mine", is_trainable=True)
trainable_counts = trainable.get_nb_trainable_parameters(), trainable.active_adapter
"""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 5}])
def test_the_same_folder_means_the_same(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    folder = adapter(tmp_path / "adapter", family=family, **settings)
    theirs, ours = both(LOADED, folder=str(folder), family=family)
    assert gap(ours.out, theirs.out) < 1e-5
    for name in ("inner", "between"):
        assert torch.equal(ours.nested[name], ours.nested["inner"])
        assert gap(ours.nested[name], theirs.nested[name]) < 1e-5
    assert torch.equal(ours.nested["after"], ours.out)
    assert gap(ours.nested["inner"], ours.out) > 0.05
    for fact in ("counts", "parameters", "facts", "config_names", "active", "names_inside", "prefix", "base"):
        assert getattr(ours, fact) == getattr(theirs, fact), fact
    assert ours.still == ours.counts  # peft's adapter trains after the block, though it was loaded frozen
    assert ours.trainable_counts == theirs.trainable_counts
    assert ours.state.keys() == theirs.state.keys()
    assert all(torch.equal(ours.state[key], theirs.state[key]) for key in theirs.state)


SEVERAL = """
from peft import LoraConfig, PeftModel
seen = []
def note():
    trains = sorted({name for name in ("first", "second", "third") for key, p in model.named_parameters()
                     if p.requires_grad and f".{name}." in key})
    outputs.append(model(IDS).logits.detach())
    seen.append((model.active_adapter, list(model.active_adapters), trains, sorted(model.peft_config)))
outputs = []
model = PeftModel.from_pretrained(tiny("gpt2"), folders["first"], adapter_name="first")
note()
result = model.load_adapter(folders["second"], adapter_name="second")
note()
model.set_adapter("second")
note()
model.add_adapter("third", LoraConfig(r=2, target_modules=["c_attn"]))
note()
model.set_adapter("third", inference_mode=True)
note()
model.base_model.set_adapter(["first", "second"])
outputs.append(model(IDS).logits.detach())
both_active = list(model.active_adapters)
model.set_adapter("first")
model.set_requires_grad("second")
note()
model.delete_adapter("first")
note()
model.delete_adapter("third")
note()
missing = result.unexpected_keys
"""


def test_several_adapters(tmp_path: Path) -> None:
    folders = {name: str(adapter(tmp_path / name, seed=seed)) for seed, name in enumerate(["first", "second"])}
    theirs, ours = both(SEVERAL, folders=folders)
    assert ours.seen == theirs.seen
    assert ours.both_active == theirs.both_active == ["first", "second"]
    assert ours.missing == theirs.missing == []
    for number, (output, reference) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
        assert gap(output, reference) < 1e-5, number


MERGED = """
from peft import PeftModel
model = PeftModel.from_pretrained(tiny("llama"), folders["first"], adapter_name="first")
model.load_adapter(folders["second"], adapter_name="second")
before = model(IDS).logits.detach()
model.merge_adapter()
merged = model(IDS).logits.detach()
model.unmerge_adapter()
unmerged = model(IDS).logits.detach()
model.merge_adapter(adapter_names=["second"])
second = model(IDS).logits.detach()
model.unmerge_adapter()
active = list(model.active_adapters)
restored = model(IDS).logits.detach()
"""


def test_merge_and_unmerge(tmp_path: Path) -> None:
    folders = {
        name: str(adapter(tmp_path / name, family="llama", seed=seed)) for seed, name in enumerate(["first", "second"])
    }
    theirs, ours = both(MERGED, folders=folders)
    assert ours.active == theirs.active == ["first"]
    for name in ("before", "merged", "second", "restored"):
        assert gap(getattr(ours, name), getattr(theirs, name)) < 1e-5, name
    assert torch.equal(ours.unmerged, ours.before)
    assert torch.equal(ours.restored, ours.before)
    assert gap(ours.second, ours.before) > 0.05


UNLOADED = """
from peft import PeftModel
model = PeftModel.from_pretrained(tiny("gpt2"), folder)
adapted = model(IDS).logits.detach()
back = model.unload()
plain = back(IDS).logits.detach()
model = PeftModel.from_pretrained(tiny("gpt2"), folder)
whole = model.merge_and_unload(progressbar=False, safe_merge=True)
merged = whole(IDS).logits.detach()
keys = list(whole.state_dict())
kind = type(whole).__name__
"""


def test_unload_and_merge_and_unload(tmp_path: Path) -> None:
    theirs, ours = both(UNLOADED, folder=str(adapter(tmp_path / "adapter")))
    for name in ("adapted", "plain", "merged"):
        assert gap(getattr(ours, name), getattr(theirs, name)) < 1e-5, name
    assert gap(ours.merged, ours.adapted) < 1e-5
    assert torch.equal(ours.plain, logits(ours.tiny("gpt2")))
    assert (ours.keys, ours.kind) == (theirs.keys, theirs.kind)


ROWS = """
from peft import PeftModel
model = PeftModel.from_pretrained(tiny("llama"), folders["first"], adapter_name="first")
model.load_adapter(folders["second"], adapter_name="second")
names = ["first", "__base__"], ["second", "first"]
out = [model(input_ids=IDS, adapter_names=each).logits.detach() for each in names]
words = model.generate(input_ids=IDS, adapter_names=names[0], max_new_tokens=4, do_sample=False)
beams = model.generate(input_ids=IDS, adapter_names=names[1], max_new_tokens=4, num_beams=2, do_sample=False)
"""


def test_mixed_batch(tmp_path: Path) -> None:
    folders = {
        name: str(adapter(tmp_path / name, family="llama", seed=seed)) for seed, name in enumerate(["first", "second"])
    }
    theirs, ours = both(ROWS, folders=folders)
    for output, reference in zip(ours.out, theirs.out, strict=True):
        assert gap(output, reference) < 1e-5
    assert torch.equal(ours.words, theirs.words)
    assert torch.equal(ours.beams, theirs.beams)


WEIGHTED = """
from peft import PeftModel
model = PeftModel.from_pretrained(tiny("gpt2"), folders["first"], adapter_name="first")
model.load_adapter(folders["second"], adapter_name="second")
model.add_weighted_adapter(["first", "second"], [0.7, -0.4], "sum", combination_type=kind, svd_rank=rank)
active = list(model.active_adapters)
model.set_adapter("sum", inference_mode=True)
out = model(IDS).logits.detach()
r = model.peft_config["sum"].r
counts = model.get_nb_trainable_parameters()
"""


@pytest.mark.parametrize(("kind", "rank", "expected"), [("cat", None, 7), ("svd", None, 4), ("svd", 2, 2)])
def test_weighted_adapter(tmp_path: Path, kind: str, rank: int | None, expected: int) -> None:
    folders = {name: str(adapter(tmp_path / name, seed=r, r=r)) for name, r in (("first", 4), ("second", 3))}
    theirs, ours = both(WEIGHTED, folders=folders, kind=kind, rank=rank)
    assert gap(ours.out, theirs.out) < 1e-4
    assert ours.r == theirs.r == expected
    assert (ours.active, ours.counts) == (theirs.active, theirs.counts)


ENTRYWISE = """
from peft import PeftModel
model = PeftModel.from_pretrained(tiny("gpt2"), folders[0], adapter_name="first")
model.load_adapter(folders[1], adapter_name="second")
model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "sum", combination_type=kind, svd_rank=32, density=density)
model.set_adapter("sum")
out = model(IDS).logits.detach()
"""


@pytest.mark.parametrize(("kind", "density"), [("ties_svd", 0.5), ("dare_linear_svd", 1.0)])
def test_entrywise_combination(tmp_path: Path, kind: str, density: float) -> None:
    """DARE at density 1 drops nothing; below it the draws differ."""
    folders = [str(adapter(tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    theirs, ours = both(ENTRYWISE, folders=folders, kind=kind, density=density)
    assert gap(ours.out, theirs.out) < 1e-4


COUNTED = """
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
torch.manual_seed(0)
model = get_peft_model(make(), LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", **settings))
model.print_trainable_parameters()
model.save_pretrained(str(folder / LoraConfig.__module__))
again = PeftModel.from_pretrained(make(), str(folder / LoraConfig.__module__), is_trainable=True)
counts = again.get_nb_trainable_parameters()
"""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["score"]},
        {"layers_to_transform": [1], "rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)
def test_variants_train_and_write_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs, ours = both(COUNTED, make=classifier, folder=tmp_path, settings=settings)
    assert ours.printed == theirs.printed
    assert ours.counts == theirs.counts
    files = [load_file(path) for path in sorted(tmp_path.rglob("*.safetensors"))]
    shapes = [{key: tuple(tensor.shape) for key, tensor in tensors.items()} for tensors in files]
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]


def classifier() -> Any:
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip(names, (40, 32, 64, 2, 4), strict=True))
    return LlamaForSequenceClassification(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=2, num_labels=3))


STATE = """
from peft import (LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model,
                  set_peft_model_state_dict)
source = PeftModel.from_pretrained(tiny("gpt2"), folder)
state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(source).items()}
model = get_peft_model(tiny("gpt2"), LoraConfig(r=4, target_modules=["c_attn"]), adapter_name="other")
held = [p for p in model.parameters() if p.requires_grad]
part = dict(list(state.items())[:-1], surplus=torch.zeros(1))
partial = set_peft_model_state_dict(model, part, adapter_name="other")
result = set_peft_model_state_dict(model, state, adapter_name="other")
out = model.eval()(IDS).logits.detach()
same = all(a is b for a, b in zip(held, (p for p in model.parameters() if p.requires_grad), strict=True))
answers = partial.unexpected_keys, result.unexpected_keys
injected = inject_adapter_in_model(LoraConfig(r=4, target_modules=["c_attn"]), tiny("gpt2"))
kind = type(injected).__name__
"""


def test_state_dicts(tmp_path: Path) -> None:
    theirs, ours = both(STATE, folder=str(adapter(tmp_path / "adapter")))
    assert gap(ours.out, theirs.out) < 1e-5
    assert ours.answers == theirs.answers == (["surplus"], [])
    assert ours.partial.missing_keys == [list(ours.state)[-1]]
    assert ours.same, "an optimizer would train parameters that are no longer there"
    assert ours.kind == theirs.kind == "GPT2LMHeadModel"
