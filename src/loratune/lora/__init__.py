"""The mathematics of low-rank adaptation; torch and nothing else."""

from loratune.lora.dropout import TokenCounter
from loratune.lora.equation import LowRank, lora_parameters, scale_of
from loratune.lora.init import generator_for, initial_factors
from loratune.lora.layer import AdapterState, LoraLayer, adapt_in_place, adapter_prefixes, patched_forward, release

__all__ = [
    "AdapterState",
    "LoraLayer",
    "LowRank",
    "TokenCounter",
    "adapt_in_place",
    "adapter_prefixes",
    "generator_for",
    "initial_factors",
    "lora_parameters",
    "patched_forward",
    "release",
    "scale_of",
]
