"""Adapters as files and as values; no model is needed to handle them."""

from loratune.adapter.card import card_of
from loratune.adapter.combination import Combined, combine
from loratune.adapter.difference import Difference, diff
from loratune.adapter.format import config_to_json, count_parameters, read_adapter, read_config, write_adapter
from loratune.adapter.gguf import gguf_tensors, read_gguf, write_gguf
from loratune.adapter.hub import adapter_folder
from loratune.adapter.keys import to_keys
from loratune.adapter.plain import Plain, plain, same_update
from loratune.adapter.spectrum import Inspection, effective_rank, inspect, singular_values
from loratune.adapter.value import DTYPES, Factors, Origin, SavedAdapter, Stack
from loratune.adapter.vectors import as_lora

__all__ = [
    "DTYPES",
    "Combined",
    "Difference",
    "Factors",
    "Inspection",
    "Origin",
    "Plain",
    "SavedAdapter",
    "Stack",
    "adapter_folder",
    "as_lora",
    "card_of",
    "combine",
    "config_to_json",
    "count_parameters",
    "diff",
    "effective_rank",
    "gguf_tensors",
    "inspect",
    "plain",
    "read_adapter",
    "read_config",
    "read_gguf",
    "same_update",
    "singular_values",
    "to_keys",
    "write_adapter",
    "write_gguf",
]
