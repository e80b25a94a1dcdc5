"""Base models: where they come from, on what they run, and the attention that packed rows need."""

from loratune.kernels import kernels_of
from loratune.model.allocator import freed_memory_kept
from loratune.model.attention import (
    CannotPackError,
    packed_inputs,
    packing,
    use_packed_attention,
    why_no_shared_prefixes,
    why_not_packed,
)
from loratune.model.decoding_linear import decoding, end_decoding, prepare_decoding
from loratune.model.device import (
    available_memory,
    device_name,
    kind_of_device,
    peak_memory,
    pick_device,
    pick_dtype,
    processor_name,
    total_memory,
)
from loratune.model.fingerprint import exact_hash, fingerprint
from loratune.model.fuse import fuse, fused, may_be_fused, unfuse, why_not_fused
from loratune.model.given import given_back
from loratune.model.head import has_separate_head, hidden_at, logits_from, only_positions
from loratune.model.last_layer import ends_early
from loratune.model.load import (
    Base,
    base_of,
    config_of,
    context_of,
    empty_model,
    find_base,
    load_base,
    load_tokenizer,
    stop_ids,
    tokenizer_hashes,
)
from loratune.model.modes import adapter_training, evaluating
from loratune.model.quiet import quietly
from loratune.model.recompute import recompute_activations
from loratune.model.save import save_plain
from loratune.model.slot_attention import SlotStep
from loratune.model.task import FEATURES, LANGUAGE_MODEL, Head, inside, is_loaded, names_of, task_of_loaded, usual_task
from loratune.model.tiny import tiny_model
from loratune.model.tree_attention import pairs_at_once

__all__ = [
    "Base",
    "FEATURES",
    "LANGUAGE_MODEL",
    "CannotPackError",
    "Head",
    "SlotStep",
    "adapter_training",
    "available_memory",
    "base_of",
    "config_of",
    "context_of",
    "decoding",
    "device_name",
    "empty_model",
    "end_decoding",
    "evaluating",
    "find_base",
    "exact_hash",
    "fingerprint",
    "freed_memory_kept",
    "ends_early",
    "fuse",
    "fused",
    "given_back",
    "has_separate_head",
    "inside",
    "is_loaded",
    "kernels_of",
    "hidden_at",
    "kind_of_device",
    "load_base",
    "load_tokenizer",
    "logits_from",
    "names_of",
    "may_be_fused",
    "only_positions",
    "packed_inputs",
    "packing",
    "pairs_at_once",
    "peak_memory",
    "pick_device",
    "pick_dtype",
    "prepare_decoding",
    "processor_name",
    "quietly",
    "recompute_activations",
    "save_plain",
    "stop_ids",
    "task_of_loaded",
    "tiny_model",
    "tokenizer_hashes",
    "total_memory",
    "unfuse",
    "use_packed_attention",
    "usual_task",
    "why_no_shared_prefixes",
    "why_not_fused",
    "why_not_packed",
]
