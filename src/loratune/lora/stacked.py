"""One adapter's low-rank terms on a stack of experts that is one parameter.

Its tensors are laid out as in peft's files: A (experts · r, in) has the experts one above the other, B (out, r ·
experts) the first columns of all experts before their second ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratune.lora.equation import LowRank
from loratune.lora.updated import Term


class StackedLowRank(LowRank):
    """The update of expert e is s · Bₑ Aₑ with Aₑ (r, in) and Bₑ (out, r), added to its matrix (out, in).

    Attributes:
        experts: how many there are. transposed: whether their matrices are stored (in, out).
        ndim: of the parameter; a single matrix is a stack of one.
    """

    def __init__(self, A: Tensor, B: Tensor, *, scale: float, experts: int, transposed: bool, ndim: int = 3) -> None:
        super().__init__(A, B, scale=scale)
        self.experts, self.transposed, self.ndim = experts, transposed, ndim

    @property
    def r(self) -> int:
        return self.A.shape[0] // self.experts

    def each(self) -> tuple[Tensor, Tensor]:
        """A (experts, r, in) and B (experts, out, r), sharing the parameters' memory."""
        return apart(self.A, self.B, self.experts)

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Each expert's own factors."""
        A, B = self.each()
        return list(zip(A, B, strict=True))

    def matrices(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        del dtype
        raise TypeError("a stack of updates has a pair of factors for each expert, not one for all")

    def term(self) -> Term:
        """The update as what is added to the parameter as it is stored."""
        A, B = self.each()
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        if self.ndim == 2:
            left, right = left[0], right[0]
        # B's layout is the file's; products want each expert's factor in one piece.
        return Term(left.contiguous(), right.contiguous(), self.scale)

    def change(self, number: int, dtype: torch.dtype) -> Tensor:
        """s · Bₑ Aₑ of one expert, detached, as its matrix is stored."""
        A, B = (factor[number].detach().to(dtype) for factor in self.each())
        update = (B @ A) * self.scale
        return update.T if self.transposed else update

    def fits(self, parameter: Tensor | None) -> bool:
        """Whether it is what this was made for, by its shape."""
        matrix = (self.A.shape[1], len(self.B)) if self.transposed else (len(self.B), self.A.shape[1])
        return parameter is not None and tuple(parameter.shape) == (self.experts, *matrix)[3 - self.ndim :]

    def extra_repr(self) -> str:
        return f"experts={self.experts}, r={self.r}, in={self.A.shape[1]}, out={len(self.B)}, scale={self.scale:g}"


def apart(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A (experts, r, in) and B (experts, out, r) of tensors in the layout of a file."""
    return A.view(experts, -1, A.shape[1]), B.view(len(B), -1, experts).permute(2, 0, 1)


def together_again(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The layout of a file from A (experts, r, in) and B (experts, out, r)."""
    return A.reshape(-1, A.shape[2]), B.permute(1, 2, 0).reshape(B.shape[1], -1)
