"""Which rows of which tables an adapter has its own of (`trainable_token_indices`), and which modules share them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from loratune.adapt.replacing import Replacement
from loratune.adapter.keys import TOKEN_ROWS
from loratune.config import LoraConfig
from loratune.config.patterns import name_matches
from loratune.errors import nearest
from loratune.lora import Retraining, base_of, has_own, names_by_parameter
from loratune.quant import DenseWeight, adaptable, why_not_adaptable

# Where peft looks for tokens that stand without a module's name, unless the model says where its embedding is.
_USUAL = "embed_tokens"


@dataclass(frozen=True, slots=True)
class ReplacedRows(Replacement):
    """Some rows of one module's table.

    Attributes:
        tokens: which, in the order of the file. followers: paths of modules that share the table.
    """

    tokens: tuple[int, ...] = ()
    followers: tuple[str, ...] = ()

    @property
    def features(self) -> int:
        return self.parameters // len(self.tokens)

    def shown(self, name: str) -> str:
        del name
        return f"{self.path.rpartition('.')[2]}, {len(self.tokens)} rows"

    @property
    def paths(self) -> tuple[str, ...]:
        return self.path, *self.followers


def plan_token_rows(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    taken: Collection[str],
    *,
    loosely: bool,
    problems: list[str],
) -> list[ReplacedRows]:
    """The rows that train, by module in the model's order; `problems` gets what prevents it.

    Args:
        taken: paths of the modules whose weights the adapter changes otherwise.
        loosely: names are ends of paths without regard to dots, as peft compares them.
    """
    asked = _by_path(model, modules, config, problems, loosely=loosely)
    names = names_by_parameter(modules.items())
    found = []
    for path in [path for path in modules if path in asked]:
        tied = names.get(id(modules[path]._parameters.get("weight")), [])
        leader, *followers = [name.rpartition(".")[0] for name in tied] or [path]
        if path != leader and asked.get(leader) == asked[path]:
            continue  # it follows anyway
        against = [f"{path}: {why}" for why in _against(modules[path], asked[path])]
        against += [f"{other}: {why}" for other in followers for why in _against(modules[other], ())]
        if path != leader:
            against = [f"{path}: it shares its table with {leader}, which it follows: name the tokens of that one"]
        against += [
            f"{other}: its rows are to train, and the adapter changes its weight already"
            for other in dict.fromkeys((path, *followers))
            if other in taken
        ]
        problems += [f"trainable_token_indices: {why}" for why in against]
        if not against:
            features = cast(nn.Parameter, modules[path]._parameters["weight"]).shape[1]
            numbers = {TOKEN_ROWS: len(asked[path]) * features}
            found.append(ReplacedRows(path, numbers, 0, asked[path], tuple(followers)))
    return found


def _by_path(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, problems: list[str], *, loosely: bool
) -> dict[str, tuple[int, ...]]:
    """Module path → tokens; each name that matches no module is a problem."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if not isinstance(wanted, dict):
        wanted = {_embedding_of(model, modules): wanted}
    found: dict[str, tuple[int, ...]] = {}
    for name, tokens in wanted.items():
        paths = [path for path in modules if (path.endswith(name) if loosely else name_matches(name, path))]
        if not paths:
            short = list(dict.fromkeys(path.rpartition(".")[2] for path in modules))
            problems.append(f"trainable_token_indices: {name!r} matches no module{nearest(name, short)}")
        found |= dict.fromkeys(paths, tokens)
    return found


def _embedding_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    find = getattr(model, "get_input_embeddings", None)
    try:
        embedding = find() if callable(find) else None
    except NotImplementedError:  # a model of transformers without one
        embedding = None
    return next((path for path, module in modules.items() if module is embedding), _USUAL)


def _against(module: nn.Module, tokens: tuple[int, ...]) -> Iterator[str]:
    weight, kind = adaptable(module), base_of(type(module))
    if not (isinstance(module, nn.Embedding) or kind is nn.Linear) or not isinstance(weight, DenseWeight):
        yield f"a {kind.__name__} has no table of tokens that could be trained"
        return
    if why := why_not_adaptable(module, kind):
        yield why
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        yield "scale_grad_by_freq=True divides the gradient of a whole table, of which some rows have none"
    if has_own(module, "lora_rows") and not isinstance(module, Retraining):
        yield "it has an attribute called 'lora_rows' already"
    number = len(weight.parameter)
    beyond = [token for token in tokens if token >= number]
    if beyond:
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        yield f"no row {beyond[0]}{more} in a table of {number}: resize the vocabulary first"
