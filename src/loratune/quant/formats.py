"""The formats of a quantised weight: what is stored of a matrix, and the matrix again.

Both are torch and bitsandbytes' functions on tensors that are ours. Its modules are not used: on some processors they
pack their bytes anew in an evaluation pass, with coarser scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from loratune.errors import ConfigError, nearest
from loratune.quant.library import bitsandbytes

Stored = Mapping[str, Tensor]

# Weights that are decoded at once where the whole matrix has a place already.
_AT_ONCE = 1 << 19
# Tokens up to which int8 codes are multiplied by as they are: beyond, decoding them for a product in bf16 is faster
# (SmolLM2's linear layers on two cores with AVX512: 10 against 52 ms for 1 token, 58 against 67 for 32, 103 against 93
# for 64).
_FEW_TOKENS = 48
# The kernel reads so many codes of a row at a time, and beyond the last row where a row is no multiple of it.
_CODES_AT_ONCE = 32


class Format(Protocol):
    """How a matrix is stored.

    Attributes:
        name: as `--quant` has it.
        decoded_bytes: of each weight, beside the result, while a matrix is decoded.
        coarseness: what is lost of a matrix at most, relative, where its weights are spread as networks' are.
        devices: the types of device on which it is encoded and decoded.
    """

    name: str
    devices: tuple[str, ...]
    decoded_bytes: int
    coarseness: float

    def bytes_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """What a matrix of this shape takes: its codes, and the constants that they are decoded with."""
        ...

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for `weight` (out, in), on its device."""
        ...

    def decode(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """The matrix (out, in) that these tensors stand for.

        Args:
            into: a flat tensor of that dtype in which it is written, a piece at a time; of `size_of` values at least.
        """
        ...

    def size_of(self, shape: tuple[int, int]) -> int:
        """How many values a matrix of this shape is while it is decoded."""
        ...

    def times(self, stored: Stored, x: Tensor) -> Tensor | None:
        """x Wᵀ for x (..., in) by the codes themselves, without a gradient; None where decoding them is faster."""
        ...


class NF4:
    """Four bits a weight: of each block of 64, the nearest of 16 quantiles of the normal distribution times the largest
    absolute value, which itself is kept in eight bits ("double quantisation").

    Dettmers et al., "QLoRA: Efficient finetuning of quantized LLMs" (arXiv:2305.14314), section 3.
    """

    name = "nf4"
    devices: tuple[str, ...] = ("cpu", "cuda", "mps", "xpu")
    block, outer_block = 64, 256
    decoded_bytes = 0
    coarseness = 0.15  # 0.09 for a normal distribution

    def bytes_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        blocks = -(-shape[0] * shape[1] // self.block)
        return blocks * self.block // 2, blocks + 4 * -(-blocks // self.outer_block) + 4

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        functional = bitsandbytes("functional", "quant='nf4'")
        flat = weight.detach().reshape(-1)
        # A whole number of blocks, each a row: the decoder on the CPU expects blocks to end with longer rows.
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % self.block)).reshape(-1, self.block).contiguous()
        packed, state = functional.quantize_4bit(
            flat, blocksize=self.block, quant_type=self.name, compress_statistics=True
        )
        return {
            "packed": packed.reshape(-1),
            "scales": state.absmax,
            "outer_scales": state.state2.absmax,
            "offset": state.offset.reshape(()),
        }

    def size_of(self, shape: tuple[int, int]) -> int:
        return -(-shape[0] * shape[1] // self.block) * self.block

    def decode(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        out, inner = shape
        blocks = len(stored["scales"])
        if into is None:
            flat = self._decoded(stored, slice(0, blocks), dtype)
        else:
            flat = into[: blocks * self.block]
            step = _AT_ONCE // (self.block * self.outer_block) * self.outer_block
            for begin in range(0, blocks, step):
                part = slice(begin, min(begin + step, blocks))
                flat[part.start * self.block : part.stop * self.block] = self._decoded(stored, part, dtype)
        return flat[: out * inner].view(out, inner)

    def times(self, stored: Stored, x: Tensor) -> Tensor | None:  # noqa: ARG002 - nothing here reads its codes
        return None

    def _decoded(self, stored: Stored, part: slice, dtype: torch.dtype) -> Tensor:
        """The values of some blocks, from one at which an outer block begins."""
        functional = bitsandbytes("functional", "quant='nf4'")
        packed = stored["packed"][part.start * self.block // 2 : part.stop * self.block // 2]
        scales = stored["scales"][part]
        outer = slice(part.start // self.outer_block, -(-part.stop // self.outer_block))
        state = functional.QuantState(
            absmax=scales,
            shape=(len(scales), self.block),
            dtype=dtype,
            blocksize=self.block,
            quant_type=self.name,
            code=functional.get_4bit_type(self.name, device=packed.device),
            offset=stored["offset"],
            state2=functional.QuantState(
                absmax=stored["outer_scales"][outer],
                code=dynamic_map(packed.device),
                blocksize=self.outer_block,
                dtype=torch.float32,
            ),
        )
        flat: Tensor = functional.dequantize_4bit(packed.reshape(-1, 1), state)
        return flat.reshape(-1)


class Int8:
    """Eight bits a weight: of each row, 127 steps up to its largest absolute value, as in LLM.int8() (Dettmers et al.,
    arXiv:2208.07339, section 2). Activations stay what they are, so that it is a linear map.

    A step is a number of bf16, which is all that the kernel for few tokens takes: within 0.4 % of the largest over 127.
    """

    name = "int8"
    devices: tuple[str, ...] = ("cpu", "cuda", "mps", "xpu")
    decoded_bytes = 4
    coarseness = 0.03  # 0.006 for rows of a thousand weights of a normal distribution

    def bytes_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0] * shape[1], 4 * shape[0]

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        fine = weight.detach().float()
        scales = (fine.abs().amax(1, keepdim=True) / 127).bfloat16().float()
        steps = fine / torch.where(scales > 0, scales, 1.0)
        return {"packed": steps.round_().clamp_(-127, 127).to(torch.int8), "scales": scales}

    def size_of(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]

    def decode(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        packed, scales = stored["packed"], stored["scales"]
        assert packed.shape == shape
        if into is None:
            return (packed * scales).to(dtype)
        found = into[: packed.numel()].view(shape)
        rows = max(1, _AT_ONCE // shape[1])
        for begin in range(0, shape[0], rows):
            part = slice(begin, begin + rows)
            found[part] = packed[part] * scales[part]
        return found

    def times(self, stored: Stored, x: Tensor) -> Tensor | None:
        packed, tokens = stored["packed"], x.shape[:-1].numel()
        few = 0 < tokens <= _FEW_TOKENS and x.device.type == "cpu" and x.dtype == torch.bfloat16
        if not few or packed.shape[1] % _CODES_AT_ONCE or _times_int8 is None:
            return None
        y: Tensor = _times_int8(
            x.reshape(tokens, x.shape[-1]).contiguous(), packed, stored["scales"].view(-1).bfloat16()
        )
        return y.view(*x.shape[:-1], len(packed))


# Not among torch's documented functions, so that it may be gone one day.
_times_int8: Any = getattr(torch, "_weight_int8pack_mm", None)

FORMATS: dict[str, Format] = {found.name: found for found in (NF4(), Int8())}


def refuse_format(name: str, device_type: str) -> None:
    """Raise unless there is such a format, and it can be used on such a device.

    Raises:
        ConfigError: says which there are, and where.
    """
    if name not in FORMATS:
        raise ConfigError(f"quant={name!r}: no such format{nearest(name, list(FORMATS))}", hint=" or ".join(FORMATS))
    devices = FORMATS[name].devices
    if device_type not in devices:
        raise ConfigError(
            f"quant={name!r} on {device_type!r}: its codes are made and read on {', '.join(devices)} only",
            hint=f"--device {devices[0]}, or leave --quant out",
        )


_maps: dict[torch.device, Tensor] = {}


def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' eight-bit format for statistics."""
    if device not in _maps:
        _maps[device] = bitsandbytes("functional", "quant='nf4'").create_dynamic_map().to(device)
    return _maps[device]
