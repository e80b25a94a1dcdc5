"""What a model's handle holds, and what there is to see of it; its verbs stand on this."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from loratune.adapt.entry import Entry, refuse_waiting
from loratune.adapt.groups import param_groups
from loratune.adapt.placement import Placement
from loratune.adapt.plan import TargetPlan
from loratune.adapt.register import Register
from loratune.adapt.summary import Count, count_of, summary_of
from loratune.config import LoraConfig
from loratune.lora import AdapterState, LowRank, Term, adapter_prefixes, base_parameters


class Inventory:
    """The adapters of one model, looked at."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._state = AdapterState()
        self._placement = Placement(model, self._state)
        self._register = Register()
        self._merged: tuple[str, ...] = ()
        self._kept: dict[str, Tensor] | None = None
        self._detached = False
        # Of adapters that were here when the base was merged away: the hash of the base they were made for.
        self._gone: dict[str, str | None] = {}
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}

    @property
    def names(self) -> tuple[str, ...]:
        return self._register.names

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters whose deltas the output holds; while merged, those that are in the weights."""
        return self._merged or self._state.active

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    def config(self, name: str | None = None) -> LoraConfig:
        return self._entry(name).config

    def plan(self, name: str | None = None) -> TargetPlan:
        """The target plan an adapter was made by."""
        return self._entry(name).plan

    def terms(self, name: str | None = None) -> dict[str, Term]:
        """Module path → what the adapter adds there, of whatever method; the live modules, not copies."""
        return self._placement.terms(self._one(name))

    def factors(self, name: str | None = None) -> dict[str, LowRank]:
        """Of `terms` those that are low-rank: A, B and scale; of VeRA d and b, and the factors they make."""
        return {path: term for path, term in self.terms(name).items() if isinstance(term, LowRank)}

    def replaced(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """Full name of a base tensor → the adapter's own in its place (biases, modules trained whole)."""
        return self._placement.replaced(self._one(name))

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """What trains: of one adapter, or of all."""
        names = self.names if name is None else (self._register.known(name),)
        for each, entry in self._register.of(names).items():
            refuse_waiting(each, entry)
        return [p for n in names for p in self._placement.parameters(n) if p.requires_grad]

    def param_groups(
        self, lr: float, lora_plus_ratio: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Optimizer groups; with LoRA+ (Hayou et al., arXiv:2402.12354) B learns at `lora_plus_ratio` · lr.

        Weight decay is for A, B and whole matrices; vectors (biases, magnitudes, norms) have none.
        """
        terms = [term for name in self.names for term in self._placement.terms(name).values()]
        return param_groups(
            terms, self.parameters(), lr, 1.0 if lora_plus_ratio is None else lora_plus_ratio, weight_decay
        )

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's own parameters by name: everything that is no adapter's."""
        return base_parameters(self.model)

    def base_state(self) -> dict[str, Tensor]:
        """`state_dict` without the adapters' tensors: the base, or the merged model."""
        prefixes = adapter_prefixes(self.model)
        return {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith(prefixes)}

    def count(self) -> Count:
        return count_of(self.model)

    def summary(self) -> str:
        """Trainable and total parameters, then one line for each kind of adapted module."""
        return summary_of(self.count(), {name: self.plan(name) for name in self.names}, self.active)

    def _one(self, name: str | None) -> str:
        return self._register.one(name, self.active)

    def _entry(self, name: str | None) -> Entry:
        return self._register.entries[self._one(name)]
