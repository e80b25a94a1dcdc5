"""How a model is adapted: plan, attach, and the handle with every verb.

`plan` says what a config asks of a model (`replacing`: which base tensors an adapter has its own of); `build` makes the
parts, fresh or from a file; `placement` puts them on the modules; `fold` merges; `register` knows the names; `handle`
has the verbs.
"""

from loratune.adapt.attach import adapters, attach
from loratune.adapt.bits import dequantize, quantize
from loratune.adapt.handle import Adapters
from loratune.adapt.mixing import Mixed
from loratune.adapt.plan import TargetPlan, plan
from loratune.adapt.presets import preset_of
from loratune.adapt.summary import Count, by_kind, by_replaced, share_line
from loratune.adapt.target import Target

__all__ = [
    "Adapters",
    "Count",
    "Mixed",
    "Target",
    "TargetPlan",
    "adapters",
    "attach",
    "by_kind",
    "by_replaced",
    "dequantize",
    "plan",
    "preset_of",
    "quantize",
    "share_line",
]
