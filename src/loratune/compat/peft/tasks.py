"""PEFT's classes by task: they differ in the names of what their forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from loratune.compat.peft.model import PeftModel

_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")


def _taking(*names: str) -> Callable[..., Any]:
    """A forward with these arguments, in PEFT's order; transformers' Trainer chooses columns and labels by them."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return PeftModel.forward(self, **dict(zip(names, args, strict=False)), **kwargs)

    given = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    vars(forward)["__signature__"] = inspect.Signature([first, *given, rest])
    return forward


class PeftModelForCausalLM(PeftModel, task="CAUSAL_LM"):
    forward = _taking("input_ids", "attention_mask", "inputs_embeds", "labels", *_OUTPUTS, "position_ids")


class PeftModelForSequenceClassification(PeftModel, task="SEQ_CLS"):
    forward = _taking(
        "input_ids", "attention_mask", "inputs_embeds", "labels", *_OUTPUTS, "token_type_ids", "position_ids"
    )


class PeftModelForTokenClassification(PeftModel, task="TOKEN_CLS"):
    forward = _taking(
        "input_ids", "attention_mask", "inputs_embeds", "labels", *_OUTPUTS, "token_type_ids", "position_ids"
    )


class PeftModelForSeq2SeqLM(PeftModel, task="SEQ_2_SEQ_LM"):
    forward = _taking(
        "input_ids",
        "attention_mask",
        "inputs_embeds",
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_inputs_embeds",
        "labels",
        *_OUTPUTS,
    )


class PeftModelForQuestionAnswering(PeftModel, task="QUESTION_ANS"):
    forward = _taking(
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
        *_OUTPUTS,
    )


class PeftModelForFeatureExtraction(PeftModel, task="FEATURE_EXTRACTION"):
    forward = _taking("input_ids", "attention_mask", "inputs_embeds", *_OUTPUTS, "token_type_ids", "position_ids")
