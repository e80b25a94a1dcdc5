"""How a model is adapted: plan, attach, and the handle with every verb."""

from loratune.adapt.attach import adapters, attach
from loratune.adapt.handle import Adapters, Count
from loratune.adapt.plan import Target, TargetPlan, plan
from loratune.adapt.summary import by_kind, by_replaced, share_line

__all__ = [
    "Adapters",
    "Count",
    "Target",
    "TargetPlan",
    "adapters",
    "attach",
    "by_kind",
    "by_replaced",
    "plan",
    "share_line",
]
