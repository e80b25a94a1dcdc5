"""`lora.reference()`: the base beside the model that is trained, without a copy of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from loratune.errors import AdapterStateError, MergedError
from tests.adapter.cases import IDS, logits, randomise
from tests.models import tiny


def trained(family: str = "llama", **settings: Any) -> tuple[Any, lt.Adapters]:
    """A model in training whose adapter matters."""
    torch.manual_seed(0)
    model = tiny(family, **settings)
    lora = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    randomise(model)
    return model.train(), lora


def of(reference: nn.Module) -> Tensor:
    found: Tensor = reference(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_it_is_the_base_bit_for_bit_while_the_adapter_trains(family: str) -> None:
    model, lora = trained(family)
    reference = lora.reference()
    base = logits(tiny(family))
    assert torch.equal(of(reference), base)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(lora.parameters(), lr=0.1).step()
    assert torch.equal(of(reference), base)
    assert lora.active == ("default",)
    assert not torch.equal(logits(model.eval()), base)


def test_the_models_own_dropout_is_off_in_it_and_modes_come_back() -> None:
    """A frozen copy would be in evaluation mode; the policy goes on in training mode."""
    model, lora = trained("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(of(lora.reference()), logits(tiny("gpt2")))
    assert [module.training for module in model.modules()] == modes


def test_nothing_is_trained_through_it() -> None:
    model, lora = trained()
    model.enable_input_require_grads()
    assert not of(lora.reference()).requires_grad


def test_moving_it_and_setting_its_mode_leave_the_model_alone() -> None:
    model, lora = trained()
    reference = lora.reference()
    reference.to(torch.bfloat16).eval().requires_grad_(False)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in lora.parameters())
    assert not list(reference.children())


def test_its_tensors_are_the_bases() -> None:
    _, lora = trained()
    reference, base = lora.reference(), tiny()
    assert dict(reference.named_parameters()).keys() == dict(base.named_parameters()).keys()
    assert next(reference.parameters()) is next(lora.base_parameters())[1]
    assert reference.state_dict().keys() == base.state_dict().keys()


def test_another_adapter_can_be_what_is_compared_with() -> None:
    """Preferences after instructions: the reference is the adapter that was there before."""
    model, lora = trained()
    before = lora.saved()
    expected = logits(model.eval())
    lora.load(before, "before")
    model.train()
    reference = lora.reference("before")
    with torch.no_grad():
        for parameter in lora.parameters("default"):
            parameter.add_(0.3)
    assert torch.equal(of(reference), expected)
    own = {key for key in reference.state_dict() if ".lora." in key}
    assert own
    assert all(".lora.before." in key for key in own)


def test_recomputation_sees_the_adapter_of_its_forward_pass() -> None:
    """The reference is asked between the forward and the backward pass of the policy."""
    grads = []
    for between in (False, True):
        model, lora = trained()
        model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if between:
            of(lora.reference())
        loss.backward()
        grads.append([p.grad for p in lora.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


def test_a_trainer_may_put_its_own_forward_in_place() -> None:
    """TRL's calls the trunk and the head itself; they compute as the reference's all the same."""
    _, lora = trained()
    reference: Any = lora.reference()
    reference.forward = lambda input_ids: reference.get_output_embeddings()(
        reference.base_model(input_ids).last_hidden_state
    )
    assert torch.equal(reference(input_ids=IDS), logits(tiny()))


def test_compiled_it_is_the_base_too() -> None:
    _, lora = trained()
    compiled = torch.compile(lora.reference(), backend="eager")
    assert torch.equal(compiled(input_ids=IDS).logits, logits(tiny()))


def test_unknown_merged_and_removed_adapters_are_refused() -> None:
    _, lora = trained()
    with pytest.raises(AdapterStateError, match="no adapter 'befor'"):
        lora.reference("befor")
    lora.add(lt.LoraConfig(target_modules=["q_proj"]), "before")
    with_it, base = lora.reference("before"), lora.reference()
    lora.remove("before")
    with pytest.raises(AdapterStateError, match="no adapter 'before'"):
        of(with_it)
    lora.merge()
    with pytest.raises(MergedError):
        of(base)
    with pytest.raises(MergedError):
        lora.reference()
