"""What the plan refuses: all of it at once, in words, and the model is what it was (BEHAVIOUR 1, 4, 9, 32)."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import loratune as lt
from loratune.errors import ConfigError, TargetError
from tests.adapt.model import CONFIG, bits, net, output_of, picture

QS = ("blocks.0.q", "blocks.1.q")


class Running(nn.Module):
    """A module that keeps running values, one that keeps a table, one without parameters, and a target."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.table = nn.Linear(6, 6)
        self.table.register_buffer("positions", self.table.weight.detach().clone(), persistent=False)
        self.quiet = nn.ReLU()
        self.q = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(self.embed(ids))
        return self.q(self.quiet(self.norm(x.mT).mT))  # type: ignore[no-any-return]


def no_directions(paths: tuple[str, ...], r: int, init: str) -> list[str]:
    return [f"{path}: its weight has no {r} directions for init={init!r}" for path in paths]


def odd(paths: tuple[str, ...], r: int) -> list[str]:
    return [f"{path}: init='orthogonal' needs an even rank, not {r}" for path in paths]


def both(path: str, root: str) -> str:
    return f"{path}: it is a target, and modules_to_save has {root!r}"


# Settings → every problem, in the order in which they are found.
PLANS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown module to save": (
        {"modules_to_save": ["nrom", "head"]},
        ["modules_to_save: 'nrom' matches no module; did you mean 'norm'?"],
    ),
    "a target that is saved whole": (
        {"modules_to_save": ["q"]},
        [both("blocks.0.q", "blocks.0.q"), both("blocks.1.q", "blocks.1.q")],
    ),
    "a target inside what is saved whole": ({"modules_to_save": ["blocks.1"]}, [both("blocks.1.q", "blocks.1")]),
    "an odd rank": ({"init_lora_weights": "orthogonal", "r": 3}, odd(QS, 3)),
    "an odd rank by a pattern": (
        {"init_lora_weights": "orthogonal", "rank_pattern": {"1.q": 5}},
        odd(("blocks.1.q",), 5),
    ),
    "pissa of too large a rank": ({"init_lora_weights": "pissa", "r": 7}, no_directions(QS, 7, "pissa")),
    "fast pissa of too large a rank": (
        {"init_lora_weights": "pissa_niter_3", "rank_pattern": {"0.q": 9}},
        no_directions(("blocks.0.q",), 9, "pissa_niter_3"),
    ),
    "olora of too large a rank": ({"init_lora_weights": "olora", "r": 8}, no_directions(QS, 8, "olora")),
    "all at once": (
        {
            "target_modules": ["q", "w"],
            "init_lora_weights": "olora",
            "r": 7,
            "modules_to_save": ["nrom", "haed", "1.q"],
            "alpha_pattern": {"nothing": 3},
        },
        [
            "target_modules: 'w' matches no module",
            "pattern 'nothing' matches no adapted module",
            *no_directions(QS, 7, "olora"),
            "modules_to_save: 'nrom' matches no module; did you mean 'norm'?",
            "modules_to_save: 'haed' matches no module; did you mean 'head'?",
            both("blocks.1.q", "blocks.1.q"),
        ],
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_the_plan_lists_every_problem_and_nothing_is_changed(case: str) -> None:
    settings, problems = PLANS[case]
    config = lt.LoraConfig(**{"r": 2, "target_modules": ["q"], **settings})
    model = net()
    before = picture(model)
    found = lt.plan(model, config)
    assert found.problems == tuple(problems)
    with pytest.raises(TargetError) as caught:
        lt.attach(model, config)
    assert caught.value.problems == found.problems
    assert caught.value.hint == found.hint == "linear modules of this model: q, v, head"
    assert picture(model) == before

    handle = lt.attach(model, CONFIG)
    before = picture(model, handle)
    with pytest.raises(TargetError) as caught:
        handle.add(config, "second")
    assert caught.value.problems == found.problems
    assert picture(model, handle) == before


def test_running_values_and_nothing_at_all_cannot_be_saved() -> None:
    model = Running().eval()
    before = picture(model)
    config = lt.LoraConfig(r=2, target_modules=["q"], modules_to_save=["norm", "quiet", "table"])
    with pytest.raises(TargetError) as caught:
        lt.attach(model, config)
    assert caught.value.problems == (
        "modules_to_save: 'norm' keeps running values, which no adapter can hold: norm.running_mean",
        "modules_to_save: 'quiet' has no parameters",
    )
    assert picture(model) == before
    handle = lt.attach(model, config.replace(modules_to_save=["table"]))
    assert set(handle.replaced()) == {"table.weight", "table.bias"}


def test_a_module_whose_place_is_taken_cannot_be_saved() -> None:
    model: Any = net()
    model.blocks[0].norm.lora_replaced = nn.Identity()
    before = picture(model)
    config = lt.LoraConfig(r=2, target_modules=["q"], modules_to_save=["norm"])
    with pytest.raises(TargetError) as caught:
        lt.attach(model, config)
    assert caught.value.problems == ("blocks.0.norm: it has an attribute called 'lora_replaced' already",)
    assert picture(model) == before


def test_the_largest_rank_has_directions() -> None:
    for init in ("pissa", "pissa_niter_2", "olora"):
        model = net()
        before = bits(output_of(model))
        lt.attach(model, lt.LoraConfig(r=6, target_modules=["q", "v"], init_lora_weights=init))
        assert bits(output_of(model)) == before


BEHIND = "lora_bias=True and {} cannot go together"
# Settings → every problem that the config itself has, whatever the model.
CONFIGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "dora": ({"use_dora": True}, {BEHIND.format("use_dora=True")}),
    "pissa": ({"init_lora_weights": "pissa"}, {BEHIND.format("init_lora_weights='pissa'")}),
    "olora": ({"init_lora_weights": "olora"}, {BEHIND.format("init_lora_weights='olora'")}),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {BEHIND.format("init_lora_weights='orthogonal'")}),
    "all at once": (
        {"use_dora": True, "init_lora_weights": "pissa", "r": 0, "bias": "some", "modules_to_save": [3]},
        {
            BEHIND.format("use_dora=True"),
            BEHIND.format("init_lora_weights='pissa'"),
            "r=0: input should be greater than or equal to 1",
            "bias='some'",
            "modules_to_save=[3]: 3 is not a module name",
        },
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bias_behind_b_goes_with_the_plain_update_only(case: str) -> None:
    settings, problems = CONFIGS[case]
    with pytest.raises(ConfigError) as caught:
        lt.LoraConfig(lora_bias=True, **settings)
    found = set(caught.value.problems)
    assert len(found) == len(problems)
    assert all(any(line.startswith(problem) for line in found) for problem in problems), found


@pytest.mark.parametrize("init", ["pissa_niter_0", "pissa_niter_", "pissa_niter_x", "oloraa", "swaped"])
def test_starts_that_there_are_not(init: str) -> None:
    with pytest.raises(ConfigError, match="no such initialisation"):
        lt.LoraConfig(init_lora_weights=init)
