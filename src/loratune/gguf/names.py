"""llama.cpp's names for a model's tensors, and the order in which it wants their rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune.errors import LoratuneError, nearest

# Families by transformers' model type: llama.cpp's architecture. In llama's the rows of q and k stand in another order.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
_TURNED = {"llama"}
_SUFFIXES = (".weight", ".bias")


def refuse_others(config: Any, known: Collection[str], made: str, error: type[LoratuneError]) -> None:
    """Raise `error` where the family of a model is none of these, of which `made` are made."""
    family = str(config.model_type)
    if family not in known:
        raise error(
            f"no GGUF {made} of {family!r} are made here{nearest(family, list(known))}",
            hint=f"{', '.join(known)}; `loratune merge` and llama.cpp's own converter do others",
        )


def tensor_names(config: Any) -> Callable[[str], str | None]:
    """From transformers' name of a weight or bias to llama.cpp's; None where the family has none."""
    import gguf

    arch = ARCHITECTURES[config.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table: Mapping[Any, Any] = gguf.get_tensor_name_map(number, config.num_hidden_layers)  # type: ignore[assignment]
    find: Any = table.get_name  # type: ignore[attr-defined]
    return lambda name: find(name, try_suffixes=_SUFFIXES)


def turned(rows: NDArray[Any], path: str, config: Any) -> NDArray[Any]:
    """The rows of q and k as llama.cpp's llama has them: the halves of a head's rotation beside each other.

    Args:
        rows: what belongs to the module at `path`: its weight, its bias, or an adapter's B.
    """
    last = path.rpartition(".")[2]
    if ARCHITECTURES[config.model_type] not in _TURNED or last not in ("q_proj", "k_proj"):
        return rows
    heads = config.num_attention_heads
    if last == "k_proj":
        heads = getattr(config, "num_key_value_heads", None) or heads
    apart = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(apart.swapaxes(1, 2).reshape(rows.shape))
