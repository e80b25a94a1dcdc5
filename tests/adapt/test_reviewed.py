"""What a review found: each of these was wrong once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import loratune as lt
from loratune.adapt import fold
from loratune.errors import AdapterFileError, AdapterStateError, ConfigError, MergedError
from tests.adapt.model import CONFIG, IDS, attached, bits, net, picture
from tests.models import VOCABULARY, tiny

TOKENS = torch.arange(14).view(2, 7) * 17 % VOCABULARY


def test_pefts_copy_of_a_targeted_head_is_left_out(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.eval().save_pretrained(tmp_path)
    model = tiny()
    handle = lt.attach(model, tmp_path)
    assert torch.allclose(model(TOKENS).logits, theirs(TOKENS).logits, atol=1e-5)
    assert any("lm_head.base_layer.weight" in note for note in handle.plan().notes)


def test_saving_over_another_adapter_leaves_nothing_of_its_origin(tmp_path: Path) -> None:
    lt.attach(tiny(seed=1), lt.LoraConfig(target_modules=["q_proj"])).save(tmp_path / "x")
    peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "theirs")
    lt.attach(tiny(), tmp_path / "theirs").save(tmp_path / "x")
    assert json.loads((tmp_path / "x" / "loratune.json").read_text())["base"] is None
    lt.attach(tiny(), tmp_path / "x")


def test_the_hash_is_of_the_base_as_it_is(tmp_path: Path) -> None:
    model, other = tiny(), tiny(seed=1)
    handle = lt.attach(model, lt.LoraConfig(target_modules=["q_proj"]))
    handle.save(tmp_path / "a")
    model.load_state_dict(other.state_dict(), strict=False)
    handle.save(tmp_path / "b")
    lt.attach(tiny(seed=1), tmp_path / "b")
    with pytest.raises(AdapterFileError, match="another base"):
        lt.attach(tiny(), tmp_path / "b")
    # After a one-way merge the base is gone, and its hash is not.
    handle.merge(keep_base=False)
    handle.save(tmp_path / "c")
    lt.attach(tiny(seed=1), tmp_path / "c")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_base_in_another_dtype_is_the_same_base(tmp_path: Path, dtype: torch.dtype) -> None:
    lt.attach(tiny(), lt.LoraConfig(target_modules=["q_proj"])).save(tmp_path)
    lt.attach(tiny().to(dtype), tmp_path)


def test_a_detached_handle_is_of_no_use() -> None:
    model, handle = attached()
    handle.detach()
    before = picture(model)
    for act in (lambda: handle.add(CONFIG, "ghost"), handle.activate, handle.merge):
        with pytest.raises(AdapterStateError, match="detached"):
            act()
    assert picture(model) == before
    lt.attach(model, CONFIG)


def test_a_one_way_merge_that_fails_halfway_is_known_as_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    _, handle = attached()
    calls: list[int] = []
    compute = fold._weight

    def failing(*args: Any) -> Any:
        value = compute(*args)

        def later() -> Any:
            calls.append(1)
            if len(calls) == 6:  # four looked at, one written
                raise MemoryError
            return value()

        return later

    monkeypatch.setattr(fold, "_weight", failing)
    with pytest.raises(MemoryError):
        handle.merge(keep_base=False)
    assert handle.merged
    with pytest.raises(MergedError):
        handle.merge()
    with pytest.raises(MergedError, match="cannot be undone"):
        handle.unmerge()


def test_a_base_that_was_resized_is_not_merged_into() -> None:
    model = tiny(tie_word_embeddings=False)
    handle = lt.attach(model, lt.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with handle.disabled():
        model.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(AdapterStateError) as caught:
        handle.merge()
    assert any(problem.startswith("lm_head") for problem in caught.value.problems)
    assert not handle.merged


def test_all_unknown_names_are_listed() -> None:
    _, handle = attached()
    for act in (lambda: handle.activate("x", "default", "y"), lambda: handle.rows(["x", "y"]).__enter__()):
        with pytest.raises(AdapterStateError) as caught:
            act()
        assert [problem.split(";")[0] for problem in caught.value.problems] == ["no adapter 'x'", "no adapter 'y'"]


@pytest.mark.parametrize("name", [3, True, None, "", "a/b", "/abs", "a\\b", "..", "\0"])
def test_what_cannot_name_an_adapter(name: Any) -> None:
    model, handle = attached()
    before = picture(model, handle)
    with pytest.raises(AdapterStateError, match="cannot name an adapter"):
        handle.add(CONFIG, name)
    assert picture(model, handle) == before


@pytest.mark.parametrize("dtype", ["bf16", torch.int8, torch.float8_e4m3fn])
def test_what_no_adapter_can_be(dtype: Any) -> None:
    with pytest.raises(AdapterStateError, match="A and B cannot be"):
        lt.attach(net(), CONFIG, dtype=dtype)


@pytest.mark.parametrize(
    "given", [{"lr": float("nan")}, {"lr": 0.0}, {"lr": 1.0, "lora_plus_ratio": -3}, {"lr": 1.0, "lora_plus_ratio": 0}]
)
def test_rates_that_cannot_be(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="is not a positive number"):
        attached()[1].param_groups(**given)


def test_a_weight_that_is_not_finite_is_not_decomposed() -> None:
    model = net()
    with torch.no_grad():
        model.blocks[1].q.weight[0, 0] = torch.nan
    before = picture(model)
    with pytest.raises(AdapterStateError, match=r"blocks\.1\.q: its weight holds NaN"):
        lt.attach(model, CONFIG.replace(init_lora_weights="pissa"))
    assert picture(model) == before


def test_saving_onto_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(AdapterFileError, match="is a file"):
        attached()[1].save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_the_same_seed_gives_the_same_adapter_whatever_was_there_before() -> None:
    torch.manual_seed(5)
    config = CONFIG.replace(init_lora_weights=True)
    fresh, used = lt.attach(net(), config), lt.attach(net(), config)
    for _ in range(3):
        used.add(config, "gone")
        used.remove("gone")
    torch.manual_seed(5)
    fresh.add(config, "second")
    used.add(config, "second")
    assert all(torch.equal(a.A, used.factors("second")[path].A) for path, a in fresh.factors("second").items())


def test_a_linear_that_takes_more_than_its_input() -> None:
    class Gated(nn.Linear):
        def forward(self, input: torch.Tensor, gate: float = 1.0) -> torch.Tensor:
            return super().forward(input) * gate

    model: Any = nn.Sequential(Gated(4, 3))
    x = torch.randn(2, 4)
    before = model[0](x, gate=0.5)
    lt.attach(model, lt.LoraConfig(r=1, target_modules=["0"]))
    assert bits(model[0](input=x, gate=0.5)) == bits(before)


def test_vectors_of_another_length_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for key, config in (("lora_magnitude_vector", {"use_dora": True}), ("lora_B.bias", {"lora_bias": True})):
        folder = tmp_path / key
        lt.attach(net(), CONFIG.replace(init_lora_weights=True, **config)).save(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in tensors if name.endswith(key))
        tensors[name] = tensors[name][:1].clone()  # would be broadcast
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(AdapterFileError, match="does not fit B"):
            lt.attach(net(), folder)


def test_the_output_is_what_it_was() -> None:
    """The pictures above compare something."""
    model, handle = attached()
    with handle.disabled():
        assert bits(model(IDS)) == bits(net()(IDS))


def test_everything_against_a_folder_is_said_at_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lt.attach(tiny(), lt.LoraConfig(target_modules=["q_proj"])).save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(
        {**tensors, "stranger": torch.zeros(2), name: tensors[name] * torch.nan}, tmp_path / "adapter_model.safetensors"
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": -1, "bias": "some"}))
    with pytest.raises(AdapterFileError) as caught:
        lt.attach(tiny(), tmp_path)
    for part in ("r=-1", "bias='some'", "unexpected tensor 'stranger'", "holds NaN"):
        assert any(part in problem for problem in caught.value.problems), part
    assert caught.value.hint


def test_a_taken_name_does_not_hide_what_the_plan_says() -> None:
    model, handle = attached()
    before = picture(model, handle)
    with pytest.raises(AdapterStateError) as caught:
        handle.add(CONFIG.replace(target_modules=["nowhere", "q"]), "default")
    assert len(caught.value.problems) == 2
    assert picture(model, handle) == before


def test_misshaped_and_of_another_base_at_once(tmp_path: Path) -> None:
    lt.attach(tiny(hidden_size=16), lt.LoraConfig(target_modules=["q_proj"])).save(tmp_path)
    with pytest.raises(AdapterFileError) as caught:
        lt.attach(tiny(), tmp_path)
    problems = caught.value.problems
    assert sum("expected" in problem for problem in problems) == 2
    assert sum("another base" in problem for problem in problems) == 1
