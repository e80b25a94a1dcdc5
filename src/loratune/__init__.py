"""loratune: low-rank fine-tuning that is fast, exact, and proves itself.

Importing this package is cheap: a name brings its room in when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratune.adapt import Adapters, TargetPlan, adapters, attach, plan
    from loratune.config import LoraConfig
    from loratune.errors import LoratuneError
    from loratune.lora import lora_parameters

__version__ = "0.1.0"

_ROOM_OF = {
    "Adapters": "adapt",
    "LoraConfig": "config",
    "LoratuneError": "errors",
    "TargetPlan": "adapt",
    "adapters": "adapt",
    "attach": "adapt",
    "lora_parameters": "lora",
    "plan": "adapt",
}

__all__ = [
    "Adapters",
    "LoraConfig",
    "LoratuneError",
    "TargetPlan",
    "adapters",
    "attach",
    "lora_parameters",
    "plan",
]


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'loratune' has no attribute {name!r}")
    return getattr(import_module(f"loratune.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
