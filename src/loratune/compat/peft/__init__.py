"""PEFT's names: code written for PEFT's LoRA runs with only its import line changed.

    from loratune.compat.peft import LoraConfig, PeftModel, TaskType, get_peft_model

Signatures and return values are those of peft 0.21.2; the adapters themselves belong to the handle, and where it is
stricter than PEFT its errors come through as they are. An argument that asks for what is not here is refused.
`AdapterCheckpoints` is ours: with it transformers' Trainer resumes from its checkpoints of adapters.
"""

from loratune.compat.peft.auto import AutoPeftModelForCausalLM
from loratune.compat.peft.checkpoints import AdapterCheckpoints
from loratune.compat.peft.config import LoraConfig, PeftConfig, PeftType, TaskType
from loratune.compat.peft.functions import (
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from loratune.compat.peft.kbit import prepare_model_for_kbit_training
from loratune.compat.peft.model import PeftModel
from loratune.compat.peft.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from loratune.compat.peft.tuner import LoraModel

__all__ = [
    "AdapterCheckpoints",
    "AutoPeftModelForCausalLM",
    "LoraConfig",
    "LoraModel",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
