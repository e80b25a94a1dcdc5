"""Classes swapped in place: what a module is seen as, and that it comes back. The tree as it was without adapters."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from loratune.lora import (
    AdapterState,
    LoraLayer,
    LowRank,
    Mixin,
    Recomputed,
    adapt_in_place,
    adapter_prefixes,
    base_modules,
    base_parameters,
    bind_recomputation,
    covered,
    give_back,
    patched_forward,
    release,
    replace_in,
    unbind_recomputation,
)
from loratune.quant import frozen_weight
from tests.lora.cases import SLOW


class Base(nn.Linear):
    """One that all three can be mixed into."""

    gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.seen = 0


def put_low_rank(module: nn.Module, state: AdapterState) -> None:
    layer = adapt_in_place(module, state, "x", cast(Any, frozen_weight))
    layer.lora["a"] = LowRank(torch.randn(2, 4), torch.randn(3, 2), scale=1.0)


def put_bias(module: nn.Module, state: AdapterState) -> None:
    replace_in(module, state, "a", {"bias": torch.randn(3)})


PUT: dict[str, Callable[[nn.Module, AdapterState], None]] = {
    "low rank": put_low_rank,
    "replaced": put_bias,
    "recomputed": bind_recomputation,
}
TAKE: dict[str, Callable[[nn.Module], None]] = {
    "low rank": lambda module: release(cast(LoraLayer, module)),
    "replaced": lambda module: give_back(module, "a"),
    "recomputed": unbind_recomputation,
}
KINDS = tuple(PUT)


def put(*kinds: str, active: tuple[str, ...] = ("a",)) -> nn.Module:
    torch.manual_seed(0)
    module, state = Base(), AdapterState(active)
    for kind in kinds:
        PUT[kind](module, state)
    return module


ORDERS = st.permutations(KINDS).flatmap(lambda order: st.integers(0, 3).map(lambda n: tuple(order[:n])))


@SLOW
@given(first=ORDERS, data=st.data())
def test_the_class_depends_on_what_is_on_and_not_on_the_order(first: tuple[str, ...], data: st.DataObject) -> None:
    second = data.draw(st.permutations(first))
    assert type(put(*first)) is type(put(*second))
    assert isinstance(put(*first), Base)
    assert isinstance(put(*first), Mixin) == bool(first)


@SLOW
@given(on=st.permutations(KINDS), off=st.permutations(KINDS), again=st.booleans())
def test_in_any_order_everything_comes_back(on: list[str], off: list[str], again: bool) -> None:
    module, state = Base(), AdapterState()
    before, parameters = dict(vars(module)), dict(module.named_parameters())
    for _ in range(1 + again):
        there: list[str] = []
        for kind in on:
            PUT[kind](module, state)
            there.append(kind)
            assert type(module) is type(put(*there))
        for kind in off:
            TAKE[kind](module)
            there.remove(kind)
            assert type(module) is type(put(*there))
        assert type(module) is Base
        assert vars(module) == before
        assert all(module.get_parameter(name) is parameter for name, parameter in parameters.items())


def test_the_name_says_lora_for_layers_and_nothing_for_the_others() -> None:
    assert type(put("low rank")).__name__ == "LoraBase"
    assert type(put("recomputed")).__name__ == type(put("replaced")).__name__ == "Base"
    assert type(put(*KINDS)).__name__ == "LoraBase"
    assert {type(put(*kinds)).__module__ for kinds in (KINDS, ("recomputed",))} == {__name__}


@pytest.mark.parametrize("kinds", [("low rank",), ("replaced",), ("recomputed",), KINDS])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_the_same_class_and_come_off_alone(kinds: tuple[str, ...], how: Callable[[Any], Any]) -> None:
    module = put(*kinds)
    x = torch.randn(2, 4)
    twin = how(module)
    assert type(twin) is type(module)
    assert torch.equal(twin(x), module(x))
    assert twin.lora_state is not module.lora_state
    for kind in kinds:
        TAKE[kind](twin)
    assert type(twin) is Base
    assert type(module) is type(put(*kinds))


def test_a_copied_model_has_one_state_for_all_its_layers() -> None:
    state = AdapterState(("a",))
    model = nn.Sequential(Base(), Base())
    for module in model:
        put_low_rank(module, state)
    twin = copy.deepcopy(model)
    assert cast(Any, twin[0]).lora_state is cast(Any, twin[1]).lora_state is not state


class Locked(nn.Linear):
    """As modules that hold what cannot be pickled and leave it out."""

    lock: Any

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}


def test_a_module_that_leaves_something_out_of_its_pickle_still_does() -> None:
    module = Locked(4, 3)
    module.lock = threading.Lock()
    pickle.dumps(module)
    put_low_rank(module, AdapterState())
    assert not hasattr(pickle.loads(pickle.dumps(module)), "lock")


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_somebody_puts_over_ours_is_seen(kind: str) -> None:
    """As FSDP2's `fully_shard` and `parametrize` do; a change of class would lose theirs, so callers ask first."""
    module = put(kind)
    assert not covered(module)
    module.__class__ = type(f"Sharded{type(module).__name__}", (type(module),), {})
    assert covered(module)


def test_a_class_under_ours_covers_nothing() -> None:
    sharded = type("ShardedBase", (Base,), {})()
    assert not covered(sharded)
    bind_recomputation(sharded, AdapterState())
    assert not covered(sharded)
    unbind_recomputation(sharded)
    assert type(sharded).__name__ == "ShardedBase"


# -- hooks that replace forward --------------------------------------------------------------------------------------


class Counting(ModelHook):
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cast(Base, module).seen += 1
        return args, kwargs


@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("unhooked", ["before", "after", "never"])
def test_accelerates_hooks_and_adapters_do_not_hide_each_other(hooked: str, unhooked: str) -> None:
    module, expected = Base(), put("low rank")
    module.load_state_dict({"weight": expected.weight, "bias": expected.bias})
    x = torch.randn(2, 4)
    base = module(x)
    state = AdapterState(("a",))
    if hooked == "before":
        add_hook_to_module(module, Counting())
    adapt_in_place(module, state, "x", cast(Any, frozen_weight)).lora.update(cast(Any, expected).lora)
    if hooked == "after":
        add_hook_to_module(module, Counting())
    assert not patched_forward(module)
    assert torch.equal(module(x), expected(x))
    assert module.seen == 1
    if unhooked == "before":
        remove_hook_from_module(module)
        assert torch.equal(module(x), expected(x))
    release(cast(LoraLayer, module))
    if unhooked == "after":
        remove_hook_from_module(module)
    assert type(module) is Base
    assert torch.equal(module(x), base)
    assert module.seen == (2 if unhooked == "never" else 1)


def test_a_forward_that_somebody_replaced_is_found() -> None:
    module = Base()
    assert not patched_forward(module)
    add_hook_to_module(module, Counting())
    assert not patched_forward(module), "accelerate's hook calls what it replaced"
    other = Base()
    other.forward = functools.partial(nn.Linear.forward, other)  # type: ignore[method-assign]
    assert patched_forward(other)
    borrowed = Base()
    borrowed.forward = Base().forward  # type: ignore[method-assign]
    assert patched_forward(borrowed), "another module's"
    below = Base()
    below._old_forward = lambda x: x
    assert patched_forward(below)


# -- the tree without adapters ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """Named children, one of which may be called as ours are."""

    gradient_checkpointing = False

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.gain = nn.Parameter(torch.ones(2))
        self.register_parameter("nothing", None)
        self.register_module("no_module", None)


# Names that a base may use for children of its own.
PLAIN, OURS = ("a", "b", "c", "weight"), ("lora", "lora_replaced")


@st.composite
def trees(draw: st.DrawFn, names: tuple[str, ...], *, shared: bool = True) -> nn.Module:
    """Blocks in blocks; if `shared`, some modules are in it more than once, and some parameters."""
    pool: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["linear", "norm", "block", "block"]))
        if kind == "block":
            chosen = draw(st.lists(st.sampled_from(pool), max_size=3, unique_by=None if shared else id)) if pool else []
            pool = pool if shared else [module for module in pool if module not in chosen]
            pool.append(Block(dict(zip(draw(st.permutations(names)), chosen, strict=False))))
        else:
            pool.append(nn.Linear(4, 4, bias=draw(st.booleans())) if kind == "linear" else nn.LayerNorm(4))
    linears = [module for module in pool if isinstance(module, nn.Linear)]
    if len(linears) > 1 and draw(st.booleans()):
        linears[0].weight = linears[-1].weight
    return Block({f"child{number}": module for number, module in enumerate(draw(st.permutations(pool)))})


def adapt_everything(model: nn.Module, state: AdapterState) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            adapt_in_place(module, state, "x", cast(Any, frozen_weight)).lora["one"] = LowRank(
                torch.randn(2, 4), torch.randn(4, 2), scale=1.0
            )
        elif isinstance(module, nn.LayerNorm):
            replace_in(module, state, "one", {"weight": torch.randn(4)})
        else:
            bind_recomputation(module, state)


def walked(model: nn.Module) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    return [(n, id(m)) for n, m in base_modules(model)], [(n, id(p)) for n, p in base_parameters(model)]


def check_tree(model: nn.Module) -> None:
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    assert walked(model) == (modules, parameters)
    adapt_everything(model, AdapterState())
    assert walked(model) == (modules, parameters)


def check_names(model: nn.Module) -> None:
    before = list(model.state_dict())
    adapt_everything(model, AdapterState())
    prefixes = adapter_prefixes(model)
    assert [name for name in model.state_dict() if not name.startswith(prefixes)] == before


@SLOW
@given(model=trees(PLAIN))
def test_the_bases_tree_is_what_it_was_before_adapters(model: nn.Module) -> None:
    check_tree(model)


@SLOW
@given(model=trees(PLAIN, shared=False))
def test_names_without_the_adapters_prefixes_are_the_bases(model: nn.Module) -> None:
    check_names(model)


def test_a_shared_modules_adapters_have_a_prefix_at_each_of_its_paths() -> None:
    shared = nn.Linear(4, 4)
    check_names(Block({"a": shared, "b": Block({"c": shared})}))


def test_a_base_may_call_its_own_children_as_ours_are_called() -> None:
    for name in OURS:
        check_tree(Block({name: Block({"inner": nn.Linear(4, 4)})}))
        check_names(Block({name: Block({"inner": nn.Linear(4, 4)})}))


def test_the_walk_does_not_enter_adapters() -> None:
    model = nn.Sequential(Base(), Base())
    state = AdapterState()
    for module in model:
        put_low_rank(module, state)
        put_bias(module, state)
    expected = walked(model)
    for module in model:
        for number in range(20):
            low_rank = LowRank(torch.randn(2, 4), torch.randn(3, 2), scale=1.0)
            cast(LoraLayer, module).lora[f"adapter{number}"] = low_rank
    assert walked(model) == expected
    assert [name for name, _ in base_modules(model)] == ["", "0", "1"]
    assert adapter_prefixes(model) == ("0.lora.", "0.lora_replaced.", "1.lora.", "1.lora_replaced.")


def test_the_walk_of_an_adapted_module_itself() -> None:
    module = put("low rank", "replaced")
    assert [name for name, _ in base_modules(module)] == [""]
    assert adapter_prefixes(module) == ("lora.", "lora_replaced.")


def test_recomputed_is_no_holder() -> None:
    model = nn.Sequential(Base())
    bind_recomputation(model[0], AdapterState())
    assert isinstance(model[0], Recomputed)
    assert adapter_prefixes(model) == ()


def test_tensors_under_a_module_are_found_by_their_attribute() -> None:
    """An adapted module keeps its `weight` under its name: what reads it gets the parameter itself."""
    module = Base()
    weight = module.weight
    put_low_rank(module, AdapterState(("a",)))
    assert module.weight is weight
    assert isinstance(cast(Tensor, module.bias), nn.Parameter)
