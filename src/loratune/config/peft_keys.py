"""What PEFT's `adapter_config.json` may hold, and the value at which a key asks for nothing.

The key list is that of peft 0.21.2. A key that `LoraConfig` implements is not in `NEUTRAL`; when a setting is
implemented it moves from here to `LoraConfig`.
"""

from __future__ import annotations

from typing import Any

FORMAT_VERSION = "0.21.2"

# Facts about the file rather than settings of the adapter.
DESCRIPTIVE = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")

NEUTRAL: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}


def asks_for_something(key: str, value: Any) -> bool:
    """Whether `value` of a key in `NEUTRAL` differs from its neutral value (None and empty count as neutral)."""
    return value not in (None, [], {}, False, NEUTRAL[key])
