"""loratune: low-rank fine-tuning that is fast, exact, and proves itself.

Importing this package is cheap: a name brings its room in when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratune.adapt import Adapters, TargetPlan, adapters, attach, dequantize, plan, quantize
    from loratune.config import LoraConfig, TrainConfig
    from loratune.errors import LoratuneError
    from loratune.lora import lora_parameters
    from loratune.run import (
        Run,
        combine,
        compare,
        diff,
        evaluate,
        export,
        generate,
        inspect,
        merge,
        open_run,
        reproduce,
        show,
        train,
    )

_ROOM_OF = {
    "Adapters": "adapt",
    "LoraConfig": "config",
    "LoratuneError": "errors",
    "Run": "run",
    "TargetPlan": "adapt",
    "TrainConfig": "config",
    "adapters": "adapt",
    "attach": "adapt",
    "combine": "run",
    "compare": "run",
    "dequantize": "adapt",
    "diff": "run",
    "evaluate": "run",
    "export": "run",
    "generate": "run",
    "inspect": "run",
    "lora_parameters": "lora",
    "merge": "run",
    "open_run": "run",
    "plan": "adapt",
    "quantize": "adapt",
    "reproduce": "run",
    "show": "run",
    "train": "run",
}

# Written out for tools that read it without running it; a test holds the two lists together.
__all__ = [
    "Adapters",
    "LoraConfig",
    "LoratuneError",
    "Run",
    "TargetPlan",
    "TrainConfig",
    "adapters",
    "attach",
    "combine",
    "compare",
    "dequantize",
    "diff",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "lora_parameters",
    "merge",
    "open_run",
    "plan",
    "quantize",
    "reproduce",
    "show",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'loratune' has no attribute {name!r}")
    return getattr(import_module(f"loratune.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
