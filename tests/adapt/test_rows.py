"""One adapter for each row of a batch: equal to separate runs, for inference, and refused in words (BEHAVIOUR 21)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from loratune.errors import AdapterStateError, MergedError
from tests.adapt.model import CONFIG, IDS, attached, bits, net, picture
from tests.models import VOCABULARY, tiny

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
NAMES = ("a", None, "b", "a", "c", None)
ROWS = torch.arange(6 * 5).view(6, 5) * 17 % VOCABULARY


def mixed(family: str) -> tuple[Any, lt.Adapters]:
    """Three adapters of different ranks, scales, targets and starts."""
    model = tiny(family)
    targets = TARGETS[family]
    handle = lt.attach(model, lt.LoraConfig(r=4, target_modules=targets, init_lora_weights=False), name="a")
    behind: dict[str, Any] = {"target_modules": targets[:1], "lora_bias": True, "init_lora_weights": False}
    handle.add(lt.LoraConfig(r=2, lora_alpha=3, use_rslora=True, **behind), "b")
    handle.add(lt.LoraConfig(r=3, target_modules=targets[1:], init_lora_weights="pissa"), "c")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters("c"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, handle


def alone(model: Any, handle: lt.Adapters, name: str | None, run: Callable[[], Tensor]) -> Tensor:
    before = handle.active
    handle.activate(*([] if name is None else [name]))
    found = run()
    handle.activate(*before)
    return found


def logits(model: Any, ids: Tensor = ROWS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", TARGETS)
def test_each_row_is_what_a_run_of_its_own_gives(family: str) -> None:
    model, handle = mixed(family)
    before = logits(model)
    with handle.rows(NAMES):
        together = logits(model)
        assert not handle.active
    for row, name in enumerate(NAMES):
        expected = alone(model, handle, name, lambda: logits(model))[row]
        assert gap(together[row], expected) < 1e-5, name
    outputs = [alone(model, handle, name, lambda: logits(model))[0] for name in ("a", None, "b", "c")]
    assert all(gap(x, y) > 0.05 for i, x in enumerate(outputs) for y in outputs[:i]), "they must differ to say anything"
    assert handle.active == ("a",)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", TARGETS)
def test_generation_of_a_mixed_batch(family: str) -> None:
    model, handle = mixed(family)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def generated() -> Tensor:
        return model.generate(ROWS, attention_mask=torch.ones_like(ROWS), **settings)  # type: ignore[no-any-return]

    with handle.rows(NAMES):
        together = generated()
    separate = {name: alone(model, handle, name, generated) for name in set(NAMES)}
    for row, name in enumerate(NAMES):
        assert torch.equal(together[row], separate[name][row]), name
    assert len({tuple(map(tuple, tokens.tolist())) for tokens in separate.values()}) == 4


@pytest.mark.parametrize("name", ["a", "b", None])
def test_one_name_for_all_rows_is_that_adapter_to_the_bit(name: str | None) -> None:
    model, handle = mixed("gpt2")
    expected = alone(model, handle, name, lambda: logits(model))
    with handle.rows([name] * 6):
        assert torch.equal(logits(model), expected)
    assert handle.active == ("a",)


class Flattening(nn.Module):
    """A model that makes one long row of its batch on the way, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.proj = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.proj(self.embed(ids).flatten(0, 1))
        return x.view(*ids.shape, 5)


def test_layers_that_see_a_flattened_batch() -> None:
    torch.manual_seed(0)
    model = Flattening().eval()
    config = lt.LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    handle = lt.attach(model, config, name="a")
    handle.add(config, "b")
    with handle.rows(["b", "a"]):
        together = model(IDS)
    for row, name in enumerate("ba"):
        handle.activate(name)
        assert torch.allclose(together[row], model(IDS)[row], atol=1e-6)


# -- blocks in blocks --------------------------------------------------------------------------------------------------


def test_rows_and_disabled_in_each_other() -> None:
    model, handle = attached("second")
    default, base = bits(model(IDS)), bits(alone(model, handle, None, lambda: model(IDS)))
    with handle.rows(["second", None]):
        mixed_rows = bits(model(IDS))
    assert len({mixed_rows, default, base}) == 3
    with handle.disabled():
        with handle.rows(["second", None]):
            assert bits(model(IDS)) == mixed_rows
            with handle.disabled():
                assert bits(model(IDS)) == base
            assert bits(model(IDS)) == mixed_rows
        assert bits(model(IDS)) == base
    with handle.rows(["default", "default"]):
        assert bits(model(IDS)) == default
        with handle.rows(["second", None]):
            assert bits(model(IDS)) == mixed_rows
        assert bits(model(IDS)) == default
    with pytest.raises(KeyError), handle.rows(["second", None]):
        raise KeyError
    assert handle.active == ("default",)
    assert bits(model(IDS)) == default
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("inner", [("second", None, "default"), None])
def test_an_inner_block_may_have_another_batch(inner: tuple[str | None, ...] | None) -> None:
    model, handle = attached("second")
    with handle.rows(["second", None]), handle.disabled() if inner is None else handle.rows(inner):
        model(torch.tensor([[1, 2], [3, 4], [5, 6]]))


def test_renaming_inside_keeps_each_row_its_adapter() -> None:
    model, handle = attached("second")
    with handle.rows(["second", "default"]):
        before = bits(model(IDS))
        handle.rename("second", "renamed")
        assert bits(model(IDS)) == before
    with handle.rows(["renamed", "default"]):
        assert bits(model(IDS)) == before


# -- what changes between two blocks is seen ---------------------------------------------------------------------------


def step(handle: lt.Adapters) -> None:
    for parameter in handle.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(handle.parameters(), lr=0.1).step()


def refill(handle: lt.Adapters) -> None:
    handle.remove("second")
    torch.manual_seed(99)  # the same seed would give the same start
    handle.add(CONFIG, "second")


def load_zeros(handle: lt.Adapters) -> None:
    state = handle.model.state_dict()
    handle.model.load_state_dict({key: value * (".lora.second." not in key) for key, value in state.items()})


def add_ones(handle: lt.Adapters) -> None:
    with torch.no_grad():
        for low_rank in handle.factors("second").values():
            low_rank.B.add_(1.0)


def double_data(handle: lt.Adapters) -> None:
    for parameter in handle.parameters("second"):
        parameter.data.mul_(2.0)


def scale_up(handle: lt.Adapters) -> None:
    for low_rank in handle.factors("second").values():
        low_rank.scale *= 2


def widen(handle: lt.Adapters) -> None:
    handle.model.double()


CHANGES: dict[str, Callable[[lt.Adapters], object]] = {
    "an optimizer's step": step,
    "a change in place": add_ones,
    "a loaded state": load_zeros,
    "another adapter of the same name": refill,
    "a change through .data": double_data,
    "another scale": scale_up,
    "another dtype": widen,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_blocks_is_seen(change: str) -> None:
    model, handle = attached("second", dtype=torch.bfloat16 if change == "another dtype" else torch.float32)
    with handle.rows(["second", "default"]):
        before = model(IDS)
    CHANGES[change](handle)
    with handle.rows(["second", "default"]):
        after = model(IDS)
    assert not torch.equal(before[0], after[0])
    for row, name in enumerate(("second", "default")):
        assert torch.allclose(after[row], alone(model, handle, name, lambda: model(IDS))[row], atol=1e-5), name


# -- refusals ----------------------------------------------------------------------------------------------------------


def entered(handle: lt.Adapters, *names: str | None) -> None:
    with handle.rows(names):
        raise AssertionError("the block was entered")


@pytest.mark.parametrize("way", ["positional", "keyword", "embeddings", "generate"])
@pytest.mark.parametrize("names", [("a", "b"), ("a", "a"), (None, "a", "b", "c")])
def test_another_number_of_rows_is_refused_before_anything_is_computed(way: str, names: tuple[str | None, ...]) -> None:
    model, handle = mixed("llama")
    ids = ROWS[:3]
    calls: list[object] = []
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    embedded = torch.zeros(3, 5, 32)
    ways: dict[str, Callable[[], object]] = {
        "positional": lambda: model(ids),
        "keyword": lambda: model(attention_mask=torch.ones(1, 5), input_ids=ids),
        "embeddings": lambda: model(inputs_embeds=embedded, use_cache=False),
        "generate": lambda: model.generate(ids, max_new_tokens=2),
    }
    with handle.rows(names), pytest.raises(AdapterStateError) as caught:
        ways[way]()
    assert str(caught.value).startswith(f"rows() has {len(names)} names, and the batch has 3 rows\nhint: give one name")
    assert not calls
    assert handle.active == ("a",)


@pytest.mark.parametrize("names", [("default", "secnd"), ("secnd",), (None, "secnd")])
def test_an_unknown_name_is_refused_with_the_nearest(names: tuple[str | None, ...]) -> None:
    model, handle = attached("second")
    before = picture(model, handle)
    with pytest.raises(AdapterStateError, match="no adapter 'secnd'; did you mean 'second'"):
        entered(handle, *names)
    assert picture(model, handle) == before


@pytest.mark.parametrize(
    ("names", "problems"),
    [
        (None, ("rows() was given a NoneType, not a list of names",)),
        (5, ("rows() was given a int, not a list of names",)),
        ("default", ("rows() was given a str, not a list of names",)),
        ({"default", None}, ("rows() was given a set, not a list of names",)),
        ([["default"], None, 1], ("row 1 has a list, not a name", "row 3 has a int, not a name")),
    ],
)
def test_what_is_no_list_of_names_is_refused(names: Any, problems: tuple[str, ...]) -> None:
    model, handle = attached()
    before = picture(model, handle)
    with pytest.raises(AdapterStateError) as caught, handle.rows(names):
        pass
    assert caught.value.problems == problems
    assert "one name, or None for the base, for each row" in caught.value.hint
    assert picture(model, handle) == before


def test_names_may_come_one_by_one() -> None:
    model, handle = attached()
    with handle.rows(["default", None]):
        expected = bits(model(IDS))
    with handle.rows(iter(["default", None])):  # type: ignore[arg-type]
        assert bits(model(IDS)) == expected


def test_training_mode_is_refused_at_the_block_and_inside_it() -> None:
    model, handle = attached("second")
    model.train()
    with pytest.raises(AdapterStateError, match="for inference"):
        entered(handle, "default", "second")
    model.eval()
    with handle.rows(["default", "second"]):
        model.train()
        with pytest.raises(AdapterStateError, match="for inference"):
            model(IDS)


def test_no_names_and_training_mode_are_said_together() -> None:
    model, handle = attached()
    model.train()
    with pytest.raises(AdapterStateError) as caught:
        entered(handle)
    assert len(caught.value.problems) == 2


def test_merged_is_refused() -> None:
    model, handle = attached("second")
    handle.merge()
    before = picture(model, handle)
    with pytest.raises(MergedError, match="'default' is merged"):
        entered(handle, "default", "second")
    assert picture(model, handle) == before


# Adapters that say something about the whole batch, and in which words they are refused beside others.
WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "'whole' is a DoRA adapter, which cannot share a batch"),
    "biases": ({"bias": "lora_only"}, "'whole' has its own blocks.0.q.bias, for all rows"),
    "a norm": ({"modules_to_save": ["blocks.1.norm"]}, "'whole' has its own blocks.1.norm.weight, for all rows"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_share_a_batch_goes_alone(kind: str) -> None:
    model, handle = attached()
    settings, message = WHOLE[kind]
    handle.add(CONFIG.replace(**settings), "whole")
    with torch.no_grad():
        for parameter in handle.parameters("whole"):
            parameter.add_(0.1)
    for other in ("default", None):
        before = picture(model, handle)
        with pytest.raises(AdapterStateError) as caught:
            entered(handle, other, "whole")
        assert [problem[: len(message)] for problem in caught.value.problems] == [message]
        assert picture(model, handle) == before
    expected = alone(model, handle, "whole", lambda: model(IDS))
    with handle.rows(["whole", "whole"]):
        assert torch.equal(model(IDS), expected)


def test_all_that_cannot_share_a_batch_is_listed() -> None:
    _, handle = attached()
    for kind, (settings, _) in WHOLE.items():
        handle.add(CONFIG.replace(**settings), kind)
    with pytest.raises(AdapterStateError) as caught:
        entered(handle, "dora", "biases", "a norm", "default")
    assert len(caught.value.problems) == 3


# What would change the adapters of a block under it.
INSIDE: dict[str, tuple[Callable[[lt.Adapters], object], str]] = {
    "activate": (lambda h: h.activate("default"), "inside this rows"),
    "activate none": (lambda h: h.activate(), "inside this rows"),
    "merge": (lambda h: h.merge(), "outlive this block"),
    "remove": (lambda h: h.remove("second"), "'second' is active"),
}


@pytest.mark.parametrize("names", [("default", "second"), ("second", "second")])
@pytest.mark.parametrize("verb", INSIDE)
def test_inside_the_block_this_is_refused(verb: str, names: tuple[str, ...]) -> None:
    model, handle = attached("second")
    before = picture(model, handle)
    act, message = INSIDE[verb]
    with handle.rows(names):
        inside = bits(model(IDS))
        with pytest.raises(AdapterStateError, match=message):
            act(handle)
        assert bits(model(IDS)) == inside
    assert picture(model, handle) == before
    handle.remove("second")


def test_the_model_stays_usable_after_detaching_inside() -> None:
    model, handle = attached("second")
    with handle.rows(["default", "second"]):
        handle.detach()
    assert bits(model(IDS)) == bits(net()(IDS))
    assert not model._forward_pre_hooks
