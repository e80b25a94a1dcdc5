"""PEFT's names: code written for PEFT's LoRA runs with only its import line changed.

    from loratune.compat.peft import LoraConfig, PeftModel, TaskType, get_peft_model

Signatures and return values are those of peft 0.21.2; the adapters themselves belong to the handle, and where it is
stricter than PEFT its errors come through as they are. An argument that asks for what is not here is refused, and a
name of PEFT's that is not here says what there is instead. An adapted layer has no `lora_A` and `lora_B`: its tensors
are in `model.base_model.handle.factors()`. With `loratune.compat.trainer.AdapterTraining` transformers' Trainer resumes
from its checkpoints of adapters.
"""

from typing import Any

from loratune.compat.peft.absent import absent
from loratune.compat.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from loratune.compat.peft.config import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
    PeftWarning,
    TaskType,
    VeraConfig,
)
from loratune.compat.peft.functions import (
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from loratune.compat.peft.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
from loratune.compat.peft.model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from loratune.compat.peft.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from loratune.compat.peft.tuner import PEFT_TYPE_TO_TUNER_MAPPING, LoraModel
from loratune.errors import LoratuneError as PeftError
from loratune.errors import TargetError as NoMatchingPeftModuleError

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "IA3Config",
    "LoraConfig",
    "LoraModel",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "VeraConfig",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    raise absent(name, __all__)
