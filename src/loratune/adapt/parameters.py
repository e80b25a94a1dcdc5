"""Parameters that are adapted by themselves, past any module that could be: stacked experts first of all.

Which are meant, where peft's files keep their tensors, and what they cannot have (peft 0.21.2: `target_parameters`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from loratune.config import LoraConfig
from loratune.config.patterns import name_matches
from loratune.errors import nearest
from loratune.lora import OnParameters, base_of, has_own
from loratune.quant import Form, StackedWeight, stacked_weight, why_not_stacked

_SHOWN = 12
# In peft's files a module's second adapted parameter is wrapped around its first.
_INNER = ".base_layer"


class Stacked(NamedTuple):
    """A parameter that is adapted.

    Attributes:
        kind: its module's class. filed: under which path a file has its tensors.
    """

    kind: str
    weight: StackedWeight
    form: Form
    filed: str


def named_parameters(modules: Mapping[str, nn.Module], config: LoraConfig, problems: list[str]) -> list[str]:
    """Full names of the parameters that the config names, in the model's order; each name without any is a problem."""
    every = [
        f"{path}.{name}"
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    found: set[str] = set()
    for name in config.target_parameters or ():
        matched = [full for full in every if name_matches(name, full)]
        if not matched:
            problems.append(f"target_parameters: {name!r} matches no parameter{_known(name, modules)}")
        found.update(matched)
    return [full for full in every if full in found]


def _known(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The nearest of the names there are, and those that are no module's weight."""
    there = dict.fromkeys(
        f"{path.rpartition('.')[2]}.{own}"
        for path, module in modules.items()
        for own, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim > 1 and not why_not_stacked(module, own)
    )
    short = ".".join(name.split(".")[-2:])
    shown = ", ".join(list(there)[:_SHOWN])
    return nearest(short, list(there)) + (f"; there are {shown}" if there else "; this model has none to adapt")


def stacks_of(
    model: nn.Module, modules: Mapping[str, nn.Module], names: Sequence[str], problems: list[str]
) -> dict[str, Stacked]:
    """The parameters of these full names that can be adapted; `problems` gets why others cannot."""
    met, found = _met(model), dict[str, Stacked]()
    inside: dict[str, list[str]] = {}
    for full in names:
        inside.setdefault(full.rpartition(".")[0], []).append(full)
    for path, own in inside.items():
        module = modules[path]
        for depth, full in enumerate(reversed(own)):
            name = full.rpartition(".")[2]
            weight = stacked_weight(module, name)
            why = why_not_stacked(module, name)
            if hasattr(nn.ModuleDict(), name):
                why = f"nothing can stand under the name {name!r}"
            if has_own(module, "lora_parameters") and not isinstance(module, OnParameters):
                why = "its module has an attribute called 'lora_parameters' already, where the adapter would stand"
            if weight is None or why:
                problems.append(f"{full}: {why}")
                continue
            kind = base_of(type(module)).__name__
            form = weight.form(met or weight.experts)
            found[full] = Stacked(kind, weight, form, path + depth * _INNER)
    return {full: found[full] for full in names if full in found}


def _met(model: Any) -> int:
    """Through how many experts a token goes, where the model's config says so; else 0."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts_per_tok", "num_experts_per_token")
    return next((int(value) for name in names if (value := getattr(text, name, None))), 0)


def parameter_problems(
    config: LoraConfig, names: Collection[str], adapted: Collection[str], saved: Collection[str], *, of_file: bool
) -> Iterator[str]:
    """Settings that adapted parameters cannot have, and what else is done to the modules that they are in.

    Args:
        adapted: paths of modules that are targets. saved: of those that train whole.
        of_file: the config describes an adapter that is there, so that its start matters no more.
    """
    if not config.target_parameters:
        return
    init = config.init_lora_weights
    if config.lora_dropout:
        yield (
            f"lora_dropout={config.lora_dropout:g}: target_parameters have updates of a weight, which has no input of "
            "its own to drop from: leave it at 0"
        )
    if config.use_dora:
        yield "use_dora=True is for modules, not for target_parameters"
    if config.lora_bias:
        yield "lora_bias=True is for modules, not for target_parameters, which have no bias"
    if config.decomposes or (init in ("eva", "loftq") and not of_file):
        yield f"init={init!r} is for modules, not for target_parameters: take true, gaussian, swapped or orthogonal"
    for full in names:
        path = full.rpartition(".")[0]
        if path in adapted:
            yield f"{full}: its module is a target itself"
        root = next((root for root in saved if path == root or path.startswith(root + ".")), None)
        if root is not None:
            yield f"{full}: it is one of target_parameters, and modules_to_save has {root!r}"
