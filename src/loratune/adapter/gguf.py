"""An adapter as a GGUF file, which llama.cpp applies to a base in GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune.adapter.value import SavedAdapter
from loratune.errors import AdapterFileError
from loratune.gguf import ARCHITECTURES, refuse_others, tensor_names, turned

Array = NDArray[np.float32]


def write_gguf(path: Path, adapter: SavedAdapter, config: Any, *, tied: bool) -> None:
    """Write a plain adapter (every scale 1).

    Args:
        config: of the base, as transformers has it.
        tied: whether the base's output head is its embedding.

    Raises:
        AdapterFileError: the family has no place in llama.cpp known here, or a module has none in the family.
    """
    import gguf

    arch = _architecture(config)
    tensors = gguf_tensors(adapter, config, tied=tied)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.config.lora_alpha))
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(adapter: SavedAdapter, config: Any, *, tied: bool) -> dict[str, Array]:
    """The tensors of the file by name: `.lora_a` (r, in) and `.lora_b` (out, r), in fp32."""
    _architecture(config)
    names = tensor_names(config)
    problems, found = [], {}
    for path, factors in adapter.factors.items():
        name = names(f"{path}.weight")
        if name is None:
            problems.append(f"{path}: llama.cpp has no name for it")
        elif tied and name == "output.weight":
            problems.append(f"{path}: it is tied to the embedding, and llama.cpp would adapt neither")
        else:
            A, B = (tensor.float().numpy() for tensor in (factors.A, factors.B))
            found[f"{name}.lora_a"], found[f"{name}.lora_b"] = A, turned(B, path, config)
    if problems:
        raise AdapterFileError(problems, hint="`loratune merge` it into its base")
    return found


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """What a file says of itself, and its tensors."""
    import gguf

    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    return said, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def _architecture(config: Any) -> str:
    refuse_others(config, ARCHITECTURES, "adapters", AdapterFileError)
    return ARCHITECTURES[str(config.model_type)]
