"""A weight with low-rank terms beside it, W + Σ s · L R, which is formed only where somebody needs it whole.

A module that keeps its experts in one parameter multiplies by slices of it in code of its own. It is given such an
object in the parameter's place: torch's own products with it are those with W and, on the same vectors, with the thin
factors. What else is done with it is done with the sum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger("loratune")
_SAID: set[tuple[str, str]] = set()
# Grouped products want rows that begin at multiples of this many bytes.
_ALIGNED = 16


class Term(NamedTuple):
    """s · L R beside a weight (..., m, n): L (..., m, r), R (..., r, n), in the dtype of their masters."""

    left: Tensor
    right: Tensor
    scale: float


class Updated:
    """W + Σ s · L R in the place of W.

    Attributes:
        weight: the parameter itself, or a part of it. terms: of the same leading dimensions.
        owner: whose it is, for what is said.
    """

    def __init__(self, weight: Tensor, terms: tuple[Term, ...], owner: str) -> None:
        self.weight, self.terms, self.owner = weight, terms, owner
        self._whole: Tensor | None = None
        self._slices: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...], float]] | None = None

    # -- as a tensor is looked at ----------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: Any) -> Any:
        """One expert, or some of them; any other part is one of the sum."""
        if self.ndim == 3 and _is_number(index):
            return self._expert(int(index))
        if self.ndim == 3 and isinstance(index, Tensor) and index.ndim == 1:
            terms = tuple(Term(left[index], right[index], scale) for left, right, scale in self.terms)
            return Updated(self.weight[index], terms, self.owner)
        return self._dense_for("[]")[index]

    def _expert(self, number: int) -> Updated:
        if self._slices is None or not all(self._serves(lefts[0]) for lefts, _, _ in self._slices):
            # Taken apart at once: the gradient of one slice alone has the size of all.
            self._slices = [(left.unbind(), right.unbind(), scale) for left, right, scale in self.terms]
        terms = tuple(Term(lefts[number], rights[number], scale) for lefts, rights, scale in self._slices)
        return Updated(self.weight[number], terms, self.owner)

    def transpose(self, one: int, other: int) -> Any:
        if {one % self.ndim, other % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            return self.mT
        return self._dense_for("transpose").transpose(one, other)

    @property
    def mT(self) -> Updated:  # noqa: N802
        terms = tuple(Term(right.mT, left.mT, scale) for left, right, scale in self.terms)
        return Updated(self.weight.mT, terms, self.owner)

    @property
    def T(self) -> Any:  # noqa: N802
        return self.mT if self.ndim == 2 else self._dense_for("T").T

    def t(self) -> Any:
        return self.T

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._dense_for(name), name)

    # -- as it is computed with ------------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(cast(Any, self), other)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        product = _PRODUCTS.get(name)
        found = product(func, *args, **kwargs) if product is not None else None
        if found is not None:
            return found
        args, kwargs = _whole(args, name), {key: _whole(value, name) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """The sum, in W's dtype."""
        if self._whole is None or not self._serves(self._whole):
            whole = self.weight
            add = torch.baddbmm if self.ndim == 3 else torch.addmm
            with torch.autocast(whole.device.type, enabled=False):
                for left, right, scale in self.terms:
                    whole = add(whole, left.to(whole.dtype), right.to(whole.dtype), alpha=scale)
            self._whole = whole
        return self._whole

    def _serves(self, whole: Tensor) -> bool:
        """Whether it has the graph that is wanted now; one that was formed without gradients has none."""
        learns = any(part.requires_grad for term in self.terms for part in (term.left, term.right))
        return whole.requires_grad or not (torch.is_grad_enabled() and learns)

    def _dense_for(self, name: str) -> Tensor:
        if (self.owner, name) not in _SAID:
            _SAID.add((self.owner, name))
            _log.warning(
                f"{self.owner} uses its adapted parameter in {name!r}, for which W + ΔW is formed whole in every pass"
            )
        return self.dense()


def _of_sum(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self._dense_for(name), name)(*others)


# Python looks these up at the class, past `__getattr__`.
for _name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "radd", "rsub", "rmul", "rtruediv", "rpow", "rmatmul",
    "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "iter", "contains", "bool", "float", "int",
):  # fmt: skip
    setattr(Updated, f"__{_name}__", _of_sum(f"__{_name}__"))
Updated.__hash__ = object.__hash__  # type: ignore[method-assign]


def _is_number(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.ndim == 0 and not index.is_floating_point() and index.dtype != torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def _whole(value: Any, name: str) -> Any:
    """The value with sums in the place of what stands for them, also inside lists."""
    if isinstance(value, Updated):
        return value._dense_for(name)
    if isinstance(value, list | tuple):
        return type(value)(_whole(item, name) for item in value)
    return value


def _linear(func: Any, input: Any, weight: Any, bias: Any = None, **others: Any) -> Tensor | None:
    if others or not isinstance(weight, Updated) or not isinstance(input, Tensor) or weight.ndim != 2:
        return None
    y: Tensor = func(input, weight.weight, bias)
    for left, right, scale in weight.terms:
        h = F.linear(input, right.to(input.dtype)) * scale
        y = y + F.linear(h, left.to(h.dtype)).to(y.dtype)
    return y


def _matmul(func: Any, a: Any, b: Any, **others: Any) -> Tensor | None:
    """Of vectors, torch takes the dimensions of a product otherwise; that is left to the sum."""
    if others or isinstance(a, Updated) == isinstance(b, Updated) or min(a.ndim, b.ndim) < 2:
        return None
    if isinstance(b, Updated):
        y: Tensor = func(a, b.weight)
        for left, right, scale in b.terms:
            h = torch.matmul(a, left.to(a.dtype)) * scale
            y = y + torch.matmul(h, right.to(h.dtype)).to(y.dtype)
        return y
    y = func(a.weight, b)
    for left, right, scale in a.terms:
        h = torch.matmul(right.to(b.dtype), b) * scale
        y = y + torch.matmul(left.to(h.dtype), h).to(y.dtype)
    return y


def _grouped(func: Any, input: Any, weight: Any, *rest: Any, **others: Any) -> Tensor | None:
    """Vectors (S, m) that are sorted by expert, each times its own expert's (m, n)."""
    if not isinstance(weight, Updated) or not isinstance(input, Tensor) or input.ndim != 2 or weight.ndim != 3:
        return None
    product = partial(func, **others)
    y: Tensor = product(input, weight.weight, *rest)
    for left, right, scale in weight.terms:
        # More ranks, all zero, so that rows begin where the kernels want them.
        more = -left.shape[-1] % (_ALIGNED // input.dtype.itemsize)
        h = product(input, F.pad(left.to(input.dtype), (0, more)), *rest) * scale
        y = y + product(h, F.pad(right.to(h.dtype), (0, 0, 0, more)), *rest).to(y.dtype)
    return y


_PRODUCTS: dict[str, Callable[..., Tensor | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), _grouped),
}
