"""Embeddings of language models as targets: tied heads, batches of several adapters, vocabularies of another size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loratune as lt
from loratune.errors import AdapterFileError, AdapterStateError, TargetError
from tests.adapt.model import bits
from tests.adapter.cases import IDS, gap, logits, randomise
from tests.models import VOCABULARY, tiny

TENSORS = "adapter_model.safetensors"
EMBED = "model.embed_tokens"
CONFIG = lt.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])


def trained(family: str = "llama", config: lt.LoraConfig = CONFIG, **changes: Any) -> tuple[Any, lt.Adapters]:
    model = tiny(family, **changes)
    handle = lt.attach(model, config)
    randomise(model)
    return model, handle


def test_all_linear_takes_none() -> None:
    found = lt.plan(tiny("llama"), lt.LoraConfig(target_modules="all-linear"))
    assert not [target for target in found.targets if "embed" in target.path]


def test_it_is_counted_and_shown() -> None:
    model, handle = trained()
    (target,) = [target for target in handle.plan().targets if target.path == EMBED]
    assert (target.kind, target.parameters) == ("Embedding", 4 * (VOCABULARY + 32))
    assert target.multiplied == 4 * 32, "of A each token meets one column, without a product"
    assert handle.count().trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"embed_tokens        1 × (32 × {VOCABULARY}), r=4" in handle.summary()


@pytest.mark.parametrize("keep_base", [True, False])
def test_merged_into_an_embedding_of_its_own(keep_base: bool) -> None:
    model, handle = trained()
    before, base = logits(model), bits(model.model.embed_tokens._parameters["weight"])
    handle.merge(keep_base=keep_base)
    assert gap(logits(model), before) < 1e-5
    if keep_base:
        handle.unmerge()
        assert torch.equal(logits(model), before)
        assert bits(model.model.embed_tokens._parameters["weight"]) == base


def test_a_tied_head_stays_the_bases_and_no_merge_can_be() -> None:
    model, handle = trained("gemma3", tie_word_embeddings=True)
    assert any("its table is lm_head.weight too, which stays the base's" in note for note in handle.plan().notes)
    table, before = model.lm_head._parameters["weight"], logits(model)
    assert model.lm_head.weight is table
    with pytest.raises(AdapterStateError, match=r"embed_tokens\.weight: it is tied to lm_head\.weight"):
        handle.merge()
    assert torch.equal(logits(model), before)
    assert model.model.embed_tokens._parameters["weight"] is table
    handle.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight is table


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_of_a_batch_have_their_own(family: str) -> None:
    model, handle = trained(family)
    handle.add(CONFIG.replace(lora_alpha=40), "other")
    randomise(model)
    names = ["other", None, "default"]
    ids = torch.cat([IDS, IDS[:1] + 3])
    alone = []
    for row, name in zip(ids, names, strict=True):
        handle.activate(*([name] if name else []))
        alone.append(model(row[None]).logits)
    with handle.rows(names):
        together = model(ids).logits
    assert gap(together, torch.cat(alone)) < 1e-5
    assert gap(alone[0], alone[2]) > 0.05


def test_tokens_that_stand_in_no_rows_are_refused() -> None:
    model, handle = trained()
    model.eval()
    with pytest.raises(AdapterStateError, match=r"'default' is on model\.embed_tokens \(Embedding\)") as caught:
        handle.mixed("default")
    assert "one such adapter at a time" in caught.value.hint


def test_it_trains_behind_checkpointing_and_without_dropout() -> None:
    model = tiny("llama")
    handle = lt.attach(model, CONFIG.replace(lora_dropout=0.5))
    assert any("drops nothing of an Embedding" in note for note in handle.plan().notes)
    gradients = []
    for on in (False, True):
        model.train()
        model.gradient_checkpointing_enable() if on else None
        torch.manual_seed(5)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(handle.factors()[EMBED].A.grad)
        model.zero_grad()
    assert gradients[0].any()
    assert torch.equal(*gradients)
    seen = gradients[0].any(0).nonzero().flatten().tolist()
    assert seen == sorted(set(IDS[:, :-1].flatten().tolist())), "the columns of the tokens that were there alone"


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_a_misspelt_embedding_has_its_nearest_name() -> None:
    with pytest.raises(TargetError, match=r"'embed_token' matches no module.*'embed_tokens'"):
        lt.attach(tiny("llama"), lt.LoraConfig(target_modules=["embed_token"]))


class Offset(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + 2)


class Scores(nn.Module):
    """In and out features, and something else computed with them."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 4
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ self.weight.T, -1)


ATTENTION = (
    "a MultiheadAttention multiplies by its weights itself, past what is added to a module: name linear layers beside "
    "it, or take an attention whose projections are modules that it calls"
)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Embedding(9, 4, max_norm=1.0)
        self.offset = Offset(9, 4)
        self.scores = Scores()
        self.turned = nn.ConvTranspose1d(4, 4, 2)
        self.grouped = nn.Conv1d(4, 8, 4, groups=4)
        self.plain = nn.Embedding(9, 4)
        self.attention = nn.MultiheadAttention(4, 2)


def test_every_reason_is_given_at_once_and_nothing_changes() -> None:
    model = Odd()
    before = {name: (type(module), bits_of(module)) for name, module in model.named_modules()}
    names = ["short", "offset", "scores", "turned", "grouped", "plain", "attention"]
    config = lt.LoraConfig(r=6, target_modules=names, lora_bias=True)
    with pytest.raises(TargetError) as caught:
        lt.attach(model, config)
    assert caught.value.problems == (
        "short: an Embedding with max_norm=1 changes its own rows whenever it looks them up",
        "offset: Offset does more than look rows up, which an update would not follow",
        "scores: Scores does not compute W x + b, as its in_features and out_features say",
        "turned: a ConvTranspose1d cannot be adapted",
        f"attention: {ATTENTION}",
        "grouped: rank 6 is not divisible by its 4 groups: give it 8 in rank_pattern",
        "plain: lora_bias=True is for layers that multiply, not for an Embedding",
    )
    assert {name: (type(module), bits_of(module)) for name, module in model.named_modules()} == before
    with pytest.raises(TargetError) as caught:
        lt.attach(
            model, lt.LoraConfig(r=4, target_modules=["grouped", "plain"], init_lora_weights="olora", use_dora=True)
        )
    assert caught.value.problems == (
        "grouped: use_dora=True: a row of its weight sees one of 4 groups, and the update all of them",
        "grouped: init='olora': its weight keeps 4 groups apart, and factors from it would not",
        "plain: init='olora' is for layers that multiply: an Embedding starts with A zero and B from N(0, 1)",
    )


def bits_of(module: nn.Module) -> list[bytes]:
    return [bits(parameter) for parameter in module.parameters()]


def test_rows_and_counted_dropout_at_a_convolution_are_refused() -> None:
    from loratune.lora import TokenCounter

    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)).eval()
    config = lt.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)
    handle = lt.attach(model, config)
    handle.add(config, "other")
    x = torch.randn(2, 4, 5)
    with (
        pytest.raises(AdapterStateError, match="'default' is on 0 \\(Conv1d\\), which cannot be mixed"),
        handle.rows(["default", "other"]),
    ):
        model(x)
    drawn = [model.train()(x) for _ in range(2)]
    assert not torch.equal(*drawn), "without a counter torch's generator draws the masks"
    with (
        handle.counting(TokenCounter(1, 1, torch.arange(10).view(2, 5))),
        pytest.raises(AdapterStateError, match="lora_dropout in a convolution"),
    ):
        model(x)


# -- vocabularies ------------------------------------------------------------------------------------------------------


def of_peft(folder: Path, config: dict[str, Any], **save: Any) -> Any:
    model = tiny("llama")
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, **config))
        randomise(theirs)
        theirs.save_pretrained(str(folder), **save)
    return theirs.eval()


SAVED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "targeted": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"save_embedding_layers": False},
        f"{EMBED}: it was made for a table of {VOCABULARY + 2} rows, and this model's has {VOCABULARY}: resize",
    ),
    "targeted, with a copy": (
        {"target_modules": ["embed_tokens"]},
        {},
        rf"{EMBED}\.weight: the file's copy of it is \({VOCABULARY + 2}, 32\), and this model's is \({VOCABULARY},",
    ),
    "resized": (
        {"target_modules": ["q_proj"]},
        {"save_embedding_layers": True},
        rf"lm_head\.weight: the file's copy of it is \({VOCABULARY + 2}, 32\)",
    ),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_vocabulary_of_another_size_is_said(tmp_path: Path, case: str) -> None:
    config, save, why = SAVED[case]
    theirs = of_peft(tmp_path, config, **save)
    model = tiny("llama")
    with pytest.raises(AdapterFileError, match=why) as caught:
        lt.attach(model, tmp_path)
    assert not [problem for problem in caught.value.problems if "resize its vocabulary" not in problem]
    # Resized by somebody else the new rows are others; with those of the file all is as it was there.
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    with torch.no_grad():
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            table[VOCABULARY:] = 0
    if case != "targeted":
        with pytest.raises(
            AdapterFileError, match=r"2 of its rows are not the file's; any_base=True takes this model's"
        ):
            lt.attach(model, tmp_path)
        lt.attach(model, tmp_path, any_base=True).detach()
    base = theirs.get_base_model()
    with torch.no_grad():
        for own, of_file in (("model.embed_tokens", "model.embed_tokens"), ("lm_head", "lm_head")):
            found = base.get_submodule(of_file)
            model.get_submodule(own).weight.copy_(getattr(found, "base_layer", found).weight)
    handle = lt.attach(model, tmp_path)
    assert gap(logits(model), logits(theirs)) < 1e-5
    copies = len([note for note in handle.plan().notes if "is not needed" in note])
    assert copies == {"targeted": 0, "targeted, with a copy": 1, "resized": 2}[case]


def test_a_copy_in_a_coarser_dtype_is_the_same_table(tmp_path: Path) -> None:
    model = tiny("llama")
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / TENSORS)
    key = f"base_model.model.{EMBED}.base_layer.weight"
    save_file({**tensors, key: tensors[key].bfloat16()}, tmp_path / TENSORS)
    assert lt.attach(tiny("llama"), tmp_path).names == ("default",)


def test_tensors_of_both_kinds_are_no_adapter(tmp_path: Path) -> None:
    _, handle = trained()
    handle.save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    key = f"base_model.model.{EMBED}.lora_"
    tensors[f"{key}A.weight"] = tensors.pop(f"{key}embedding_A")
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError) as caught:
        lt.attach(tiny("llama"), tmp_path)
    text = " ".join(caught.value.problems)
    assert f"{EMBED}.lora_B.weight is missing" in text
    assert f"{EMBED}.lora_embedding_A is missing" in text
    tensors[f"{key}B.weight"] = tensors.pop(f"{key}embedding_B")
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match=f"{EMBED}: its tensors are no embedding's, and the module is one"):
        lt.attach(tiny("llama"), tmp_path)
