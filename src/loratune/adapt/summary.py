"""The trainable-parameters printout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from loratune.adapt.plan import TargetPlan
from loratune.lora import base_modules
from loratune.quant import values_in


class Count(NamedTuple):
    """Parameters: those that train, all there are (the base's and every adapter's), and their ratio."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total


def count_of(model: nn.Module) -> Count:
    parameters = list(model.parameters())
    in_bits = sum(values_in(module) for _, module in base_modules(model))
    return Count(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters) + in_bits)


def by_kind(target_plan: TargetPlan) -> dict[tuple[str, int, int, int | str], tuple[int, int]]:
    """(last name, in, out, what) → (modules, trainable parameters in all of them), in the model's order.

    `what` is the rank; of (IA)³ what is rescaled.
    """
    rows: dict[tuple[str, int, int, int | str], tuple[int, int]] = {}
    for target in target_plan.targets:
        experts = f" ({target.form.experts} experts)" if target.form.experts > 1 else ""
        key = (target.path.rpartition(".")[2] + experts, target.in_features, target.out_features, target.what)
        modules, parameters = rows.get(key, (0, 0))
        rows[key] = (modules + 1, parameters + target.parameters)
    return rows


def by_replaced(target_plan: TargetPlan) -> dict[str, tuple[int, int]]:
    """Last names of tensors that the adapter has its own of ("lm_head.weight") → (tensors, parameters in all)."""
    rows: dict[str, tuple[int, int]] = {}
    for part in target_plan.replaced:
        for name, numbers in part.numbers.items():
            key = part.shown(name)
            tensors, parameters = rows.get(key, (0, 0))
            rows[key] = (tensors + 1, parameters + numbers)
    return rows


def share_line(trainable: int, total: int) -> str:
    return f"trainable {trainable:,} of {total:,} ({trainable / total:.2%})"


def summary_of(count: Count, plans: Mapping[str, TargetPlan], active: Sequence[str]) -> str:
    lines = [share_line(*count)]
    for name, target_plan in plans.items():
        state = "active" if name in active else "not active"
        own = sum(len(part.names) for part in target_plan.replaced)
        beside = f" and {own} tensors of its own" if own else ""
        lines.append(f"{name} ({state}): {target_plan.trainable:,} in {len(target_plan.targets)} modules{beside}")
        for (short, inner, outer, r), (modules, parameters) in by_kind(target_plan).items():
            each = parameters // modules
            what = f"r={r}" if isinstance(r, int) else r
            lines.append(f"  {short:<16} {modules:>4} × ({outer} × {inner}), {what}: {each:,} each, {parameters:,}")
        for full, (tensors, parameters) in by_replaced(target_plan).items():
            lines.append(f"  {full:<16} {tensors:>4} × its own: {parameters:,}")
    return "\n".join(lines)
