"""Adapters as files and as values; no model is needed to handle them."""

from loratune.adapter.card import card_of
from loratune.adapter.combination import Combined, combine
from loratune.adapter.difference import Difference, diff
from loratune.adapter.format import config_to_json, read_adapter, read_config, write_adapter
from loratune.adapter.hub import adapter_folder
from loratune.adapter.keys import DTYPES, to_keys
from loratune.adapter.spectrum import Inspection, effective_rank, inspect, singular_values
from loratune.adapter.value import Factors, Origin, SavedAdapter

__all__ = [
    "DTYPES",
    "Combined",
    "Difference",
    "Factors",
    "Inspection",
    "Origin",
    "SavedAdapter",
    "adapter_folder",
    "card_of",
    "combine",
    "config_to_json",
    "diff",
    "effective_rank",
    "inspect",
    "read_adapter",
    "read_config",
    "singular_values",
    "to_keys",
    "write_adapter",
]
