"""Names of PEFT that are not here, and what there is instead."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loratune.config.lora import INITS
from loratune.errors import nearest

_STARTS = f"init_lora_weights takes {', '.join(map(repr, INITS))}, True and False"
_PROMPTS = "prompts and prefixes are not trained here, LoRA adapters are"
_COMBINE = "adapters are combined by PeftModel.add_weighted_adapter, and side by side by load_adapter and set_adapter"

_INSTEAD = {
    "ArrowConfig": _COMBINE,
    "BdLoraConfig": "of LoRA's variants there are use_dora and use_rslora",
    "EvaConfig": _STARTS,
    "KasaConfig": "of LoRA's variants there are use_dora and use_rslora",
    "LoftQConfig": _STARTS,
    "LoraGAConfig": _STARTS,
    "LoraRuntimeConfig": "an adapter's tensors stay on the device of their layer",
    "MontecloraConfig": "of LoRA's variants there are use_dora and use_rslora",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": _COMBINE,
    "PeftMixedModel": _COMBINE,
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": _PROMPTS,
    "VeloraConfig": "of LoRA's variants there are use_dora and use_rslora",
    "bloom_model_postprocess_past_key_value": _PROMPTS,
    "compose_cartridge_adapters": _PROMPTS,
    "convert_to_lora": "loratune.adapter.as_lora makes VeRA's factors",
    "create_arrow_model": _COMBINE,
    "find_kappa_target_modules": "target_modules takes names, a regex or 'all-linear'",
    "get_eva_state_dict": _STARTS,
    "initialize_kv_prefix_from_past_key_values": _PROMPTS,
    "initialize_kv_prefix_from_text": _PROMPTS,
    "initialize_lora_eva_weights": _STARTS,
    "preprocess_loraga": _STARTS,
    "prompt_embeddings_from_past_key_values": _PROMPTS,
    "replace_lora_weights_loftq": _STARTS,
    "save_as_lora": "`loratune export --to vllm` writes VeRA's factors as LoRA's",
    "shift_tokens_right": "transformers' models shift their labels themselves",
}
# How PEFT calls its other methods, each with a config, a model and the parts of prompts.
_METHOD = re.compile(r"(?P<method>[A-Z]\w*?)(Config|Model|Init|Encoder|Embedding|ReparameterizationType)")


def absent(name: str, present: Sequence[str]) -> ImportError | AttributeError:
    """What to raise for a name that is not here: an ImportError, whose text an import shows, where PEFT has it."""
    if name in _INSTEAD:
        return ImportError(f"PEFT's {name} is not in loratune.compat.peft: {_INSTEAD[name]}")
    if method := _METHOD.fullmatch(name):
        return ImportError(
            f"{name} is not in loratune.compat.peft: LoRA, VeRA and IA3 are here of PEFT's methods (LoraConfig, "
            f"VeraConfig, IA3Config; LoraModel), not {method['method']}{nearest(name, present)}"
        )
    return AttributeError(
        f"loratune.compat.peft has no {name!r}{nearest(name, present)}; there are {', '.join(present)}"
    )
