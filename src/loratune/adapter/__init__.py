"""Adapters as files and as values; no model is needed to handle them."""

from loratune.adapter.card import card_of
from loratune.adapter.format import SavedAdapter, config_to_json, read_adapter, write_adapter
from loratune.adapter.inspect import effective_rank, singular_values

__all__ = [
    "SavedAdapter",
    "card_of",
    "config_to_json",
    "effective_rank",
    "read_adapter",
    "singular_values",
    "write_adapter",
]
