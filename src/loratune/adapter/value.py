"""One adapter as a value: its settings and tensors, without a model and without a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loratune.config import LoraConfig
from loratune.config.methods import CALLED
from loratune.lora import as_matrices, scale_of


class Stack(NamedTuple):
    """Of factors that are a stack's: how many experts it has, and the alpha of its scale.

    Attributes:
        experts: 0 where only the base tells. parameter: its full name, or "" where only the base tells.
    """

    experts: int
    alpha: float
    parameter: str = ""


# What an adapter can be computed with.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Factors(NamedTuple):
    """What an adapter holds for one module.

    Attributes:
        A: (r, in), B: (out, r). The update is scale · B A. A convolution's are (r, in, *kernel) and (out, r / groups,
            1, ...).
        bias: (out,), behind B, or None; scaled as the update is.
        magnitude: (out,), DoRA's length of each weight row, or None.
        looked_up: whether it is an embedding's, whose x is the number of a column of A.
        stack: where it is a stack's: A is (experts · r, in), expert by expert, B (out, r · experts), experts innermost.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    looked_up: bool = False
    stack: Stack | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those that are there, by name."""
        fields = zip(self._fields, self, strict=True)
        return ((name, tensor) for name, tensor in fields if isinstance(tensor, Tensor))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (r, columns) and B (out, r), kernels flattened and groups as blocks; of a single expert, not of a stack."""
        if self.stack is not None and self.stack.experts != 1:
            raise TypeError("a stack has factors for each expert, not for all")
        return as_matrices(self.A, self.B)

    def of_matrices(self, A: Tensor, B: Tensor, bias: Tensor | None) -> Factors:
        """Others of the same layer, without groups, from matrices."""
        return Factors(A.view(-1, *self.A.shape[1:]), B.view(*B.shape, *self.B.shape[2:]), bias, None, self.looked_up)

    @property
    def shown(self) -> str:
        """What its update is added to: "out × in", and the sizes of a convolution's kernel."""
        one = " × ".join(str(size) for size in (self.B.shape[0], *self.A.shape[1:]))
        return one if self.stack is None else f"{self.stack.experts} × ({one})"

    @property
    def groups(self) -> int:
        """Of a convolution's inputs; 1 of everything else."""
        return self.A.shape[0] // self.B.shape[1]


@dataclass(frozen=True, slots=True)
class Origin:
    """What an adapter was trained on, as hashes; None where it is not known."""

    base: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as a value.

    Attributes:
        factors: module path → A, B and what stands beside them.
        vectors: of another method than LoRA, module path → what trains there, by name: VeRA's "d" (r,) and "b" (out,),
            (IA)³'s "l" in the shape of its file.
        projections: VeRA's A (r, widest in) and B (widest out, r), where they are kept.
        replaced: name of a base tensor ("score.weight", "layers.0.q_proj.bias") → what stands in its place.
        base: the name or path of the base it was trained on, where known.
        origin: which base and tokenizer these were.
        unknown: keys of a foreign `adapter_config.json` that mean nothing here; kept when written again.
        surplus: tensors of a foreign file that say again what others say; left out when written again.
        about: Markdown of its model card that somebody wrote about it.
        copies: name of a base tensor → what a foreign file says that it is; the base's own counts, and has to agree.
    """

    config: LoraConfig
    factors: Mapping[str, Factors] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None
    revision: str | None = None
    origin: Origin = Origin()
    unknown: Mapping[str, Any] = field(default_factory=dict)
    surplus: tuple[str, ...] = ()
    about: str = ""
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    vectors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    projections: tuple[Tensor, Tensor] | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that it updates."""
        return (*self.factors, *self.vectors)

    @property
    def instead(self) -> str:
        """What it holds in the place of low-rank tensors, as the end of a sentence."""
        return f", but {CALLED[self.config.peft_type]}'s vectors" if self.vectors else ""

    def scale(self, path: str) -> float:
        """The factor of B A at a module path: alpha over the rank that the tensors have, or over its root."""
        rows, stack = self.factors[path].A.shape[0], self.factors[path].stack
        if stack is not None:
            return scale_of(rows // stack.experts, stack.alpha, self.config.use_rslora)
        return scale_of(rows, self.config.alpha_of(path), self.config.use_rslora)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, named by module path and role."""
        for path, factors in self.factors.items():
            for name, tensor in factors.tensors():
                yield f"{path}: {name}", tensor
        for path, vectors in self.vectors.items():
            for name, tensor in vectors.items():
                yield f"{path}: {name}", tensor
        for name, tensor in zip("AB", self.projections or (), strict=False):
            yield f"the projection {name}", tensor
        yield from self.replaced.items()
