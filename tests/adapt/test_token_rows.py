"""Rows of an embedding that train alone (`trainable_token_indices`); a tied head follows (BEHAVIOUR 15, 26, 31)."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import loratune as lt
from loratune.errors import AdapterFileError, AdapterStateError, ConfigError, TargetError
from tests.adapt.model import bits
from tests.adapter.cases import IDS, gap, logits, randomise
from tests.models import VOCABULARY, tiny

TENSORS, KEY = "adapter_model.safetensors", "base_model.model."
EMBED, ROWS = "model.embed_tokens", "token_adapter.trainable_tokens_delta"
TOKENS = (17, 5, 399, 0)
# Name → (family, whether the head is tied, what is asked for).
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "tied": ("llama", True, {"target_modules": ["q_proj"], "trainable_token_indices": list(TOKENS)}),
    "not tied": ("llama", False, {"target_modules": ["q_proj"], "trainable_token_indices": list(TOKENS)}),
    "scaled": ("gemma3", True, {"target_modules": ["v_proj"], "trainable_token_indices": list(TOKENS)}),
    "by name": ("llama", False, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 2]}}),
    "head too": (
        "llama",
        False,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 2], "lm_head": [7]}},
    ),
    "gpt2": ("gpt2", True, {"target_modules": ["c_attn"], "trainable_token_indices": [3, 40]}),
    "dora beside": (
        "llama",
        True,
        {"target_modules": ["q_proj"], "use_dora": True, "bias": "all", "trainable_token_indices": [4]},
    ),
}


def base_of(case: str) -> Any:
    family, tied, _ = CASES[case]
    return tiny(family, tie_word_embeddings=tied)


def config_of(case: str) -> lt.LoraConfig:
    return lt.LoraConfig(r=4, lora_alpha=8, **CASES[case][2])


def trained(case: str) -> tuple[Any, lt.Adapters]:
    model = base_of(case)
    handle = lt.attach(model, config_of(case))
    randomise(model)
    return model, handle


def with_rows_in_the_table(case: str, handle: lt.Adapters) -> Any:
    """The reference: the same model with the rows written into its tables, and everything else adapted as it is."""
    model = base_of(case)
    for part in handle.plan().token_rows:
        own = handle.replaced()[f"{part.path}.{ROWS}"]
        table = model.get_submodule(part.path).weight
        for row, token in zip(own.detach(), part.tokens, strict=True):
            table[token] = row
    return model


def without_rows(handle: lt.Adapters, name: str | None = None) -> Any:
    saved = handle.saved(name)
    kept = {name: tensor for name, tensor in saved.replaced.items() if not name.endswith(ROWS)}
    return replace(saved, replaced=kept, config=saved.config.replace(trainable_token_indices=None))


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_a_table_with_these_rows_does(case: str) -> None:
    model, handle = trained(case)
    reference = with_rows_in_the_table(case, handle)
    lt.attach(reference, without_rows(handle), any_base=True)
    assert gap(logits(model), logits(reference)) < 1e-5
    assert gap(logits(model), logits(base_of(case))) > 0.05
    for part in handle.plan().token_rows:
        assert torch.equal(model.get_submodule(part.path).weight, reference.get_submodule(part.path).weight)
    ids = torch.tensor([[17, 5, 399, 0, 9, 2, 7, 3, 40, 4]])
    assert gap(model(ids).logits.detach(), reference(ids).logits.detach()) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_its_gradients_are_those_of_the_tables_rows(case: str) -> None:
    model, handle = trained(case)
    reference = with_rows_in_the_table(case, handle)
    lt.attach(reference, without_rows(handle), any_base=True)
    parts = handle.plan().token_rows
    ids = torch.cat([IDS, torch.tensor([[17, 5, 399, 0, 9, 2, 7]])])
    for part in parts:
        reference.get_submodule(part.path)._parameters["weight"].requires_grad_(True)
    for each in (model, reference):
        each(input_ids=ids, labels=ids).loss.backward()
    for part in parts:
        own = handle.replaced()[f"{part.path}.{ROWS}"]
        whole = reference.get_submodule(part.path)._parameters["weight"].grad
        assert own.grad is not None
        assert gap(own.grad, whole[list(part.tokens)]) < 1e-5
        assert model.get_submodule(part.path)._parameters["weight"].grad is None


@pytest.mark.parametrize("case", CASES)
def test_from_attach_to_detach(tmp_path: Path, case: str) -> None:
    plain = base_of(case)
    model = copy.deepcopy(plain)
    handle = lt.attach(model, config_of(case))
    base = bits(logits(plain))
    assert bits(logits(model)) == base, "the start is the base"
    before = {key: bits(tensor) for key, tensor in handle.base_state().items()}
    assert handle.count().trainable == handle.plan().trainable == sum(handle.plan().sizes())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert {key: bits(tensor) for key, tensor in handle.base_state().items()} == before
    live = logits(model)
    with handle.disabled():
        assert bits(logits(model)) == base
    twin = copy.deepcopy(model)
    assert bits(logits(twin)) == bits(live)
    assert len(lt.adapters(twin).parameters()) == len(handle.parameters())
    handle.save(tmp_path / "first")
    tensors = load_file(tmp_path / "first" / TENSORS)
    rows = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key.endswith(ROWS)}
    assert rows == {f"{KEY}{part.path}.{ROWS}": (len(part.tokens), 32) for part in handle.plan().token_rows}
    assert not [key for key, tensor in tensors.items() if VOCABULARY in tensor.shape]
    again = base_of(case)
    loaded = lt.attach(again, tmp_path / "first")
    assert bits(logits(again)) == bits(live)
    loaded.save(tmp_path / "second")
    for file in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
    tables = {path: model.get_submodule(path)._parameters["weight"] for path, _ in owners(model)}
    for _ in range(2):
        handle.merge()
        assert gap(logits(model), live) < 1e-5
        assert all(model.get_submodule(path)._parameters["weight"] is table for path, table in tables.items())
        handle.unmerge()
        assert bits(logits(model)) == bits(live)
    handle.detach()
    assert {key: bits(t) for key, t in model.state_dict().items()} == before
    assert bits(logits(model)) == base
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Embedding | nn.Linear)]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        before = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.numel = max(self.numel, tensor.numel())
        return found


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_of_the_size_of_the_table_is_made_in_training(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    lt.attach(model, lt.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 9]))
    model.train()
    ids = torch.tensor([[3, 9, 4]])
    with Largest() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen.numel <= max(ids.numel() * VOCABULARY, 4 * 32 * 32) < VOCABULARY * 32
    with Largest() as seen:
        model.get_input_embeddings().weight.sum()
    assert seen.numel == VOCABULARY * 32, "who reads the table himself is given one with these rows"


def test_a_coarse_scaled_table_starts_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed_tokens": Gemma3TextScaledWordEmbedding(50, 24, 0, embed_scale=24**0.5)}).bfloat16()
    ids = torch.arange(50)[None]
    before = bits(model["embed_tokens"](ids))
    lt.attach(model, lt.LoraConfig(target_modules="dummy-target-modules", trainable_token_indices=list(range(50))))
    assert bits(model["embed_tokens"](ids)) == before


def test_the_padding_row_gets_no_gradient_here_either() -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 4, padding_idx=2)})
    config = lt.LoraConfig(target_modules="dummy-target-modules", trainable_token_indices=[5, 2])
    handle = lt.attach(model, config)
    model["embed_tokens"](torch.tensor([2, 5, 5, 1])).sum().backward()
    (own,) = handle.replaced().values()
    assert own.grad is not None
    assert own.grad.tolist() == [[2.0] * 4, [0.0] * 4]


# -- several -----------------------------------------------------------------------------------------------------------


def two(other: dict[str, Any] | None = None) -> tuple[Any, lt.Adapters]:
    model, handle = trained("tied")
    handle.add(
        lt.LoraConfig(r=2, **(other or {"target_modules": ["v_proj"], "trainable_token_indices": [6, 8]})), "other"
    )
    randomise(model)
    return model, handle


def test_other_rows_add_up_and_merge() -> None:
    model, handle = two()
    handle.activate("default", "other")
    both, reference = logits(model), tiny(tie_word_embeddings=True)
    for name in handle.names:
        (part,) = handle.plan(name).token_rows
        reference.model.embed_tokens.weight[list(part.tokens)] = handle.replaced(name)[f"{EMBED}.{ROWS}"].detach()
    mine = lt.attach(reference, without_rows(handle, "default"), any_base=True)
    mine.load(without_rows(handle, "other"), "other", any_base=True)
    mine.activate("default", "other")
    assert gap(both, logits(reference)) < 1e-5
    handle.merge()
    assert gap(logits(model), both) < 1e-5
    handle.unmerge()
    assert torch.equal(logits(model), both)


CLASHES: dict[str, tuple[dict[str, Any], str]] = {
    "a row of both": (
        {"target_modules": ["v_proj"], "trainable_token_indices": [8, 5]},
        r"'default' and 'other' both have their own row 5 of model\.embed_tokens",
    ),
    "adapted": ({"target_modules": ["embed_tokens"]}, r"rows of its own of model\.embed_tokens, and 'other' adapts it"),
    "adapted head": ({"target_modules": ["lm_head"]}, r"rows of its own of lm_head, and 'other' adapts it"),
    "whole": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        r"rows of its own of model\.embed_tokens, and 'other' has its own",
    ),
}


@pytest.mark.parametrize("case", CLASHES)
def test_what_says_nothing_definite_is_not_active_at_once(case: str) -> None:
    settings, why = CLASHES[case]
    model, handle = two(settings)
    before = logits(model)
    with pytest.raises(AdapterStateError, match=why):
        handle.activate("default", "other")
    assert torch.equal(logits(model), before)
    for name in ("other", "default"):  # one after the other they are
        handle.activate(name)
        moved = logits(model)
    assert torch.equal(moved, before)
    handle.remove("other")
    assert torch.equal(logits(model), before)


def test_renamed_frozen_and_removed() -> None:
    model, handle = two()
    live = logits(model)
    handle.rename("default", "mine")
    assert torch.equal(logits(model), live)
    handle.freeze("mine")
    assert not any(p.requires_grad for p in handle.replaced("mine").values())
    handle.unfreeze("mine")
    handle.activate("other")
    handle.remove("mine")
    assert f"{EMBED}.{ROWS}" in handle.replaced("other")
    handle.activate()
    handle.remove("other")
    assert bits(logits(model)) == bits(logits(base_of("tied")))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_batch_have_their_own(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    handle = lt.attach(model, lt.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[17, 34]))
    handle.add(lt.LoraConfig(r=2, target_modules=["embed_tokens"]), "adapted")
    handle.add(lt.LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[34, 0]), "other")
    randomise(model)
    names = ["other", None, "default", "adapted"]
    ids = torch.cat([IDS, IDS])
    alone = []
    for row, name in zip(ids, names, strict=True):
        handle.activate(*([name] if name else []))
        alone.append(logits_of(model, row[None]))
    with handle.rows(names):
        assert gap(logits_of(model, ids), torch.cat(alone)) < 1e-5
    with pytest.raises(AdapterStateError, match="has its own model"):
        handle.mixed("default")


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


# -- peft --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(tmp_path: Path, case: str) -> None:
    model, handle = trained(case)
    handle.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base_of(case), tmp_path).eval()
    assert gap(logits(theirs), logits(model)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_ours_reads_pefts(tmp_path: Path, case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base_of(case), peft.LoraConfig(r=4, lora_alpha=8, **CASES[case][2])).eval()
        randomise(theirs)
        theirs.save_pretrained(str(tmp_path / "theirs"))
    model = base_of(case)
    handle = lt.attach(model, tmp_path / "theirs")
    assert gap(logits(model), logits(theirs)) < 1e-5
    handle.save(tmp_path / "ours")
    ours, first = (load_file(tmp_path / folder / TENSORS) for folder in ("ours", "theirs"))
    assert ours.keys() == {key for key in first if key not in set(handle_surplus(handle))}
    assert all(torch.equal(ours[key], first[key]) for key in ours)


def handle_surplus(handle: lt.Adapters) -> list[str]:
    return [note.split("'")[1] for note in handle.plan().notes if "is not needed" in note]


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_whose_new_rows_train(tmp_path: Path, tied: bool) -> None:
    """What peft writes beside them, whole tables and a tied head's rows again, has to agree where it is not trained."""

    def resized(seed: int) -> Any:
        model = tiny("llama", tie_word_embeddings=tied)
        torch.manual_seed(seed)
        model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
        return model.eval()

    new = [VOCABULARY, VOCABULARY + 1]
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": new}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(resized(1), peft.LoraConfig(r=4, **settings)).eval()
        randomise(theirs)
        theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=True)
    with pytest.raises(TargetError) as caught:
        lt.attach(tiny("llama", tie_word_embeddings=tied), tmp_path / "theirs")
    assert any("no row 400 and 1 more in a table of 400: resize" in problem for problem in caught.value.problems)
    model = resized(2)
    if not tied:  # the head's new rows are in nobody's adapter
        with pytest.raises(AdapterFileError, match=r"lm_head\.weight: 2 of its rows are not the file's"):
            lt.attach(model, tmp_path / "theirs")
        model.lm_head.weight.data.copy_(theirs.get_base_model().lm_head.weight)
    handle = lt.attach(model, tmp_path / "theirs")
    assert gap(logits_of(model, torch.tensor([[5, 400, 401]])), logits_of(theirs, torch.tensor([[5, 400, 401]]))) < 1e-5
    handle.save(tmp_path / "ours")
    assert all(tensor.shape[0] < VOCABULARY for tensor in load_file(tmp_path / "ours" / TENSORS).values())


def test_new_rows_drawn_anew_make_no_other_base(tmp_path: Path) -> None:
    """Many of them, since a base is known by a sample of its numbers."""
    models = []
    for seed in (1, 2):
        models.append(tiny("llama", tie_word_embeddings=True))
        torch.manual_seed(seed)
        models[-1].resize_token_embeddings(2 * VOCABULARY, mean_resizing=False)
    added = list(range(VOCABULARY, 2 * VOCABULARY))
    new = lt.LoraConfig(target_modules=["q_proj"], trainable_token_indices=added)
    lt.attach(models[0], new).save(tmp_path)
    assert not torch.equal(logits(models[1]), logits(models[0]))
    lt.attach(models[1], tmp_path)
    assert gap(logits(models[1]), logits(models[0])) < 1e-6
    models[1].model.layers[0].mlp.up_proj.weight.data += 1
    lt.adapters(models[1]).detach()
    with pytest.raises(AdapterFileError, match="trained on another base"):
        lt.attach(models[1], tmp_path)


# -- what cannot be ----------------------------------------------------------------------------------------------------

TAKEN = "its rows are to train, and the adapter changes its weight already"
BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "names and numbers": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1], "lm_head": [400, 401], "norm": [1]}},
        (
            "trainable_token_indices: 'embed' matches no module; did you mean 'embed_tokens'?",
            "trainable_token_indices: lm_head: no row 400 and 1 more in a table of 400: resize the vocabulary first",
            "trainable_token_indices: model.norm: a LlamaRMSNorm has no table of tokens that could be trained",
        ),
    ),
    "adapted and whole": (
        {
            "target_modules": ["embed_tokens"],
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]},
        },
        (
            f"trainable_token_indices: model.embed_tokens: {TAKEN}",
            f"trainable_token_indices: lm_head: {TAKEN}",
        ),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_every_problem_at_once(case: str) -> None:
    settings, problems = BAD[case]
    model = tiny("llama", tie_word_embeddings=False)
    before = [type(module) for module in model.modules()]
    with pytest.raises(TargetError) as caught:
        lt.attach(model, lt.LoraConfig(**settings))
    found = caught.value.problems
    assert all(problem in found for problem in problems), found
    assert [type(module) for module in model.modules()] == before


def test_one_name_may_be_of_several_tables_and_peft_knows_no_dots(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {side: nn.ModuleDict({"embed_tokens": nn.Embedding(9, 4)}) for side in ("encoder", "decoder")}
    )
    config = lt.LoraConfig(target_modules="dummy-target-modules", trainable_token_indices={"embed_tokens": [5, 2]})
    handle = lt.attach(model, config)
    assert [part.path for part in handle.plan().token_rows] == ["encoder.embed_tokens", "decoder.embed_tokens"]
    assert len(handle.parameters()) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": {"tokens": [4]}}
        peft.get_peft_model(base_of("not tied"), peft.LoraConfig(**settings)).save_pretrained(str(tmp_path))
    assert set(lt.attach(base_of("not tied"), tmp_path).replaced()) == {f"{EMBED}.{ROWS}"}


def test_rows_alone_without_low_rank_terms(tmp_path: Path) -> None:
    model = base_of("tied")
    config = lt.LoraConfig(target_modules="dummy-target-modules", trainable_token_indices=list(TOKENS))
    handle = lt.attach(model, config)
    randomise(model)
    handle.save(tmp_path)
    again = base_of("tied")
    lt.attach(again, tmp_path)
    assert bits(logits(again)) == bits(logits(model))


def test_answers_are_the_same_whether_decoding_is_prepared_or_not() -> None:
    from loratune.model import decoding

    model, handle = trained("not tied")
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        expected = model(IDS[:1]).logits
        with decoding(model):
            assert gap(model(IDS[:1]).logits, expected) < 0.02
            handle.activate()
            base = model(IDS[:1]).logits
    assert gap(base, expected) > 0.05
    with decoding(model), torch.no_grad():
        assert gap(model(IDS[:1]).logits, base) < 0.02


def test_a_tied_head_is_not_named_alone() -> None:
    config = lt.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3]})
    with pytest.raises(TargetError, match=r"lm_head: it shares its table with model\.embed_tokens, which it follows"):
        lt.attach(base_of("tied"), config)
    both = config.replace(trainable_token_indices={"lm_head": [3], "embed_tokens": [3]})
    (part,) = lt.plan(base_of("tied"), both).token_rows
    assert part.paths == (EMBED, "lm_head")


WRONG: dict[str, tuple[Any, str]] = {
    "negative": ([-1], "-1 is not a token's index"),
    "a word": (["x"], "'x' is not a token's index"),
    "yes": ([True], "True is not a token's index"),
    "twice": ([3, 3], "3 is named twice"),
    "no list": (3, "3 is no list of token indices"),
    "none of a module": ({"embed_tokens": []}, "'embed_tokens': names no token"),
    "no name": ({3: [1]}, "3 is not a module name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_indices_are_looked_at_when_the_config_is_made(case: str) -> None:
    value, why = WRONG[case]
    with pytest.raises(ConfigError, match=why):
        lt.LoraConfig(trainable_token_indices=value)
    assert lt.LoraConfig(trainable_token_indices=[]).trainable_token_indices is None


def test_rows_of_another_number_in_a_file(tmp_path: Path) -> None:
    _, handle = trained("not tied")
    handle.save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    key = f"{KEY}{EMBED}.{ROWS}"
    save_file({**tensors, key: tensors[key][:3].clone()}, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match=rf"{EMBED}\.{ROWS} \(3, 32\), expected \(4, 32\)"):
        lt.attach(base_of("not tied"), tmp_path)
    del tensors[key]
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match=rf"no tensor {EMBED}\.{ROWS}, which its config saves"):
        lt.attach(base_of("not tied"), tmp_path)


def test_it_is_counted_and_shown() -> None:
    model, handle = trained("tied")
    assert "embed_tokens, 4 rows" in handle.summary()
    assert handle.count().trainable == handle.plan().trainable
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == handle.plan().trainable


def test_it_trains_behind_checkpointing() -> None:
    gradients = []
    for on in (False, True):
        model, handle = trained("tied")
        model.train()
        model.gradient_checkpointing_enable() if on else None
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(handle.replaced()[f"{EMBED}.{ROWS}"].grad)
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]
