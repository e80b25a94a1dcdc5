"""`initialise`: an adapter that starts from what its layers are given (BEHAVIOUR 9; arXiv:2410.07170)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from loratune.errors import AdapterStateError, ConfigError, TargetError
from tests.adapt.model import picture
from tests.families.zoo import built
from tests.models import VOCABULARY, tiny

IDS = torch.arange(3 * 8).view(3, 8) * 17 % VOCABULARY
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(0)}]
EVA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": "eva"}


def inputs_of(model: nn.Module, path: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """(vectors, features) that the module is given."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found])


def test_a_holds_the_leading_directions() -> None:
    model = tiny("llama")
    x = {
        path: inputs_of(model, path, BATCHES) for path in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")
    }
    start = model(IDS).logits
    lora = lt.attach(model, lt.LoraConfig(**EVA, eva_config={"rho": 1}))
    lora.initialise(BATCHES)
    assert torch.equal(model(IDS).logits, start), "B is zero"
    for path, vectors in x.items():
        A = lora.factors()[path].A
        _, _, Vh = torch.linalg.svd(vectors.double(), full_matrices=False)
        torch.testing.assert_close(A @ A.T, torch.eye(4), atol=1e-4, rtol=0)
        # The same subspace: what the oracle's directions lose in A's span is nothing.
        inside = (Vh[:4].float() @ A.T).square().sum(1)
        torch.testing.assert_close(inside, torch.ones(4), atol=2e-3, rtol=0)
    assert lora.config().rank_pattern == {}


def test_ranks_move_and_scales_stay(tmp_path: Path) -> None:
    model = tiny("llama")
    lora = lt.attach(model, lt.LoraConfig(**EVA))
    before = {target.path: target for target in lora.plan().targets}
    lora.initialise(BATCHES)
    ranks = {path: low_rank.r for path, low_rank in lora.factors().items()}
    assert sum(ranks.values()) == 4 * len(before)
    assert max(ranks.values()) > 4 > min(ranks.values()) >= 1
    assert all(low_rank.scale == before[path].scale == 1.5 for path, low_rank in lora.factors().items())
    assert {target.path: target.r for target in lora.plan().targets} == ranks
    for path in ("q_proj", "k_proj", "v_proj"):
        assert ranks[f"model.layers.0.self_attn.{path}"] == ranks["model.layers.0.self_attn.q_proj"]
        same = lora.factors()[f"model.layers.0.self_attn.{path}"].A
        assert torch.equal(same, lora.factors()["model.layers.0.self_attn.q_proj"].A), "they are given the same"

    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = model(IDS).logits
    lora.save(tmp_path)
    other = tiny("llama")
    lt.attach(other, tmp_path)
    assert torch.equal(other(IDS).logits, trained)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, trained, rtol=1e-5, atol=1e-5)


def test_rslora_keeps_its_scale() -> None:
    lora = lt.attach(tiny("llama"), lt.LoraConfig(**EVA, use_rslora=True))
    lora.initialise(BATCHES)
    assert {low_rank.r for low_rank in lora.factors().values()} != {4}
    saved = lora.saved()
    assert all(saved.scale(path) == pytest.approx(3.0) for path in saved.factors)


def test_the_same_data_gives_the_same_start() -> None:
    found = []
    for _ in range(2):
        lora = lt.attach(tiny("gpt2"), lt.LoraConfig(**EVA))
        lora.initialise(BATCHES)
        found.append({path: low_rank.A.detach().clone() for path, low_rank in lora.factors().items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][path], found[1][path]) for path in found[0])


def test_only_tokens_that_count() -> None:
    """Padding, and tokens that are not scored, change nothing of it."""
    padded = {
        "input_ids": torch.cat([IDS, IDS[:, :4]], 1),
        "attention_mask": torch.cat([torch.ones_like(IDS), torch.zeros_like(IDS[:, :4])], 1),
    }
    labels = torch.where(torch.arange(8) < 3, -100, IDS)
    starts = {}
    for name, batch in {
        "bare": {"input_ids": IDS},
        "padded": padded,
        "labelled": {"input_ids": IDS, "labels": labels},
        "all labelled": {"input_ids": IDS, "labels": IDS},
    }.items():
        lora = lt.attach(tiny("llama"), lt.LoraConfig(**EVA, eva_config={"rho": 1}))
        lora.initialise([batch])
        starts[name] = lora.factors()["model.layers.1.self_attn.q_proj"].A.abs()
    torch.testing.assert_close(starts["padded"], starts["bare"], rtol=0, atol=1e-4)
    assert torch.equal(starts["all labelled"], starts["bare"])
    assert not torch.allclose(starts["labelled"], starts["bare"], rtol=0, atol=1e-2)


def test_modes_are_left_as_they_were() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    lora = lt.attach(model, lt.LoraConfig(**EVA))
    modes = {path: module.training for path, module in model.named_modules()}
    lora.initialise(BATCHES)
    assert {path: module.training for path, module in model.named_modules()} == modes


def test_one_that_waits_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    lora = lt.attach(tiny("llama"), lt.LoraConfig(**EVA))
    for use in (lora.parameters, lambda: lora.param_groups(1e-3), lambda: lora.save(tmp_path / "adapter"), lora.saved):
        with pytest.raises(
            AdapterStateError, match=r"'default' starts from data .*which it has not seen\nhint: lora.init"
        ):
            use()
    assert not (tmp_path / "adapter").exists()


def test_refusals_change_nothing() -> None:
    model = tiny("llama")
    lora = lt.attach(model, lt.LoraConfig(**{**EVA, "init_lora_weights": True}))
    before = picture(model, lora)
    with pytest.raises(AdapterStateError, match="needs no data to start from"):
        lora.initialise(BATCHES)
    assert picture(model, lora) == before

    lora.add(lt.LoraConfig(**EVA), "second")
    factors = {path: (low_rank.A.clone(), low_rank.B.clone()) for path, low_rank in lora.factors("second").items()}
    with pytest.raises(AdapterStateError, match=r"no batch gives .* anything but zeros"):
        lora.initialise([], "second")
    with pytest.raises(ZeroDivisionError):
        lora.initialise(BATCHES, "second", forward=lambda _: 1 / 0)
    for path, low_rank in lora.factors("second").items():
        assert torch.equal(low_rank.A, factors[path][0])
    assert not any(module._forward_pre_hooks for module in model.modules())
    lora.initialise(BATCHES, "second")
    with pytest.raises(AdapterStateError, match="needs no data"):
        lora.initialise(BATCHES, "second")


def test_after_training_began() -> None:
    lora = lt.attach(tiny("llama"), lt.LoraConfig(**EVA))
    with torch.no_grad():
        next(iter(lora.factors().values())).B.add_(1)
    with pytest.raises(AdapterStateError, match="has been trained already"):
        lora.initialise(BATCHES)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rho": 0.5}, "rho=0.5: a number from 1"),
        ({"rho": True}, "rho=True: a number from 1"),
        ({"roh": 2}, "'roh' is no setting of it; did you mean 'rho'"),
        ({"whiten": True, "tau": 0.5}, "whiten=True: only False is implemented"),
        ("two", "eva_config"),
    ],
)
def test_settings_that_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lt.LoraConfig(**EVA, eva_config=given)
    assert said in str(caught.value)


def test_what_it_cannot_be_for() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(3, 4, 1))
    with pytest.raises(TargetError) as caught:
        lt.attach(net, lt.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="eva"))
    assert "0: init='eva' is for layers that multiply" in str(caught.value)
    assert "1: init='eva' is for linear layers" in str(caught.value)


def test_pefts_own_start_from_data_is_read(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        tiny("llama"),
        peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1)),
    )
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = tiny("llama")
    lora = lt.attach(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits, rtol=1e-5, atol=1e-5)
    lora.save(tmp_path / "again")


def test_one_that_waits_does_not_train_in_any_loop() -> None:
    """Whoever takes the model's parameters finds none, and what it would be without its start is not merged."""
    model = tiny("llama")
    lora = lt.attach(model, lt.LoraConfig(**EVA))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for verb in (lora.merge, lambda: lora.unfreeze("default")):
        with pytest.raises(AdapterStateError, match="which it has not seen"):
            verb()
    lora.initialise(BATCHES)
    assert len([p for p in model.parameters() if p.requires_grad]) == len(lora.parameters()) > 0


def test_a_layer_of_larger_rank_sees_as_many_directions() -> None:
    """v is given what q is given, which looks for both."""
    config = lt.LoraConfig(
        **{**EVA, "target_modules": ["q_proj", "v_proj"]}, rank_pattern={"v_proj": 12}, eva_config={"rho": 1}
    )
    lora = lt.attach(tiny("llama"), config)
    lora.initialise(BATCHES)
    assert {path.rpartition(".")[2]: low_rank.r for path, low_rank in lora.factors().items()} == {
        "q_proj": 4,
        "v_proj": 12,
    }


def test_less_is_spanned_than_the_rank_asks_for() -> None:
    lora = lt.attach(tiny("llama"), lt.LoraConfig(**{**EVA, "r": 8}, eva_config={"rho": 1}))
    lora.initialise([{"input_ids": IDS[:1, :3]}])
    path = "model.layers.0.self_attn.q_proj"
    assert lora.factors()[path].r == 3
    assert f"{path}: rank 8 → 3: what it is given spans no more" in lora.plan().notes


@pytest.mark.parametrize("fault", ["nothing counts", "infinity"])
def test_what_shows_no_directions(fault: str) -> None:
    model = tiny("llama")
    lora = lt.attach(model, lt.LoraConfig(**EVA))
    if fault == "infinity":
        model.model.embed_tokens.weight.data[5] = torch.inf
    batch = {"input_ids": torch.full((1, 4), 5)}
    labels = {"labels": torch.full((1, 4), -100)} if fault == "nothing counts" else {}
    with pytest.raises(AdapterStateError, match="NaN or infinity" if fault == "infinity" else "anything but zeros"):
        lora.initialise([{**batch, **labels}])


def test_not_for_two_texts() -> None:
    with pytest.raises(TargetError, match="init='eva' is for models of one text"):
        lt.attach(built("t5"), lt.LoraConfig(**EVA))
