"""A whole model as one GGUF file, written and compared one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.errors import CheckError, ModelError
from loratune.gguf.names import ARCHITECTURES, tensor_names, turned
from loratune.gguf.shape import Shape
from loratune.gguf.vocabulary import Vocabulary

_EMBEDDING, _HEAD, _FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class GgufModel:
    """
    Attributes:
        state: the model's tensors by transformers' names. dtype: of the matrices; vectors are in fp32.
    """

    name: str
    shape: Shape
    vocabulary: Vocabulary
    state: Mapping[str, Tensor]
    dtype: torch.dtype

    def names(self) -> dict[str, str]:
        """transformers' names → llama.cpp's; a head that is the embedding has none.

        Raises:
            ModelError: a tensor has no place in llama.cpp, or is none of floats.
        """
        find, names, problems = tensor_names(self.shape.config), {}, []
        for name, tensor in self.state.items():
            theirs = find(name)
            if theirs is None:
                problems.append(f"{name}: llama.cpp has no name for it")
            elif not tensor.is_floating_point():
                problems.append(f"{name}: it holds {tensor.dtype}, not floats")
            else:
                names[name] = theirs
        if problems:
            raise ModelError(problems, hint="`loratune merge` it into a plain model, or use llama.cpp's own converter")
        by_theirs = {theirs: self.state[name] for name, theirs in names.items()}
        if _HEAD in by_theirs and by_theirs[_HEAD].data_ptr() == by_theirs[_EMBEDDING].data_ptr():
            return {name: theirs for name, theirs in names.items() if theirs != _HEAD}
        return names

    def tensors(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Every tensor of the file, made when it is asked for."""
        if self.shape.factors is not None:
            yield _FACTORS, self.shape.factors
        for name, theirs in self.names().items():
            tensor = self.state[name].detach().to("cpu", self.dtype_of(name))
            if not tensor.isfinite().all():
                raise CheckError(f"{name}: NaN or infinity in {self.dtype}", hint="nothing was written; --dtype bf16")
            yield theirs, turned(_array(tensor), name.rpartition(".")[0], self.shape.config)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype if self.state[name].ndim > 1 else torch.float32


def write_model(path: Path, model: GgufModel) -> None:
    import gguf

    kinds = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.shape.config.model_type])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model.name)
    writer.add_file_type(kinds[model.dtype][1])
    model.shape.write(writer)
    model.vocabulary.write(writer)
    if model.shape.factors is not None:
        factors = model.shape.factors
        writer.add_tensor_info(_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for name, theirs in model.names().items():
        dtype, shape = model.dtype_of(name), model.state[name].shape
        size = shape.numel() * dtype.itemsize
        writer.add_tensor_info(theirs, list(shape), np.dtype(f"u{dtype.itemsize}"), size, raw_dtype=kinds[dtype][0])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, values in model.tensors():
            writer.write_tensor_data(values)
    finally:
        writer.close()


def compare_model(path: Path, model: GgufModel) -> int:
    """Read the file and compare it with the model, bit by bit; the number of tensors that it holds.

    Raises:
        CheckError: it holds something else.
    """
    import gguf

    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    count = 0
    for name, values in model.tensors():
        found = there.get(name)
        # GGUF names dimensions from the innermost one.
        same = found is not None and tuple(found.shape[::-1]) == values.shape
        if found is None or not same or not np.array_equal(_bytes(found.data), _bytes(values)):
            raise CheckError(f"{name}: what was read back is another tensor", hint="nothing was written")
        count += 1
    if count != len(there):
        raise CheckError(f"{len(there)} tensors read back, {count} written", hint="nothing was written")
    return count


def _array(tensor: Tensor) -> NDArray[Any]:
    # numpy has no bf16; as in the file, its bits.
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).contiguous().numpy()


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
