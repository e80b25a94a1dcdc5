"""Swapping the class of a module in place, as `torch.nn.utils.parametrize` and FSDP2 do.

The object, its tensors, its hooks and its place in the tree stay, and `isinstance` still holds. What is mixed in before
the module's own class may replace its `forward` or look up its tensors elsewhere.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from loratune.lora.state import AdapterState


class Mixin(nn.Module):
    """What can be mixed in. Subclasses are listed in the order in which their `forward` comes."""

    # Mixed in by those that are made on demand, to make them again after pickling: a function and its argument.
    made_by: tuple[Any, Any] | None = None
    order = 0
    prefix = ""
    # The child that holds adapters' tensors by this mixin's doing.
    holder: str | None = None

    # Whether copies have it too.
    lasts = True

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        mixins, base = _parts(type(self))
        mixins = tuple(mixin for mixin in mixins if mixin.lasts)
        state = self.__getstate__()  # type: ignore[no-untyped-call]  # a module may leave things out
        return _rebuild, (base, tuple(mixin.made_by or mixin for mixin in mixins)), state


class Adapting(Mixin):
    """What is mixed in for adapters' sake; it looks up in a state which of them count."""

    lora_state: AdapterState


def put_on(module: nn.Module, mixin: type[Mixin]) -> None:
    """Mix `mixin` in; a mixin of the same order that the module has gives way."""
    mixins, base = _parts(type(module))
    kept = [other for other in mixins if other.order != mixin.order]
    _become(module, _class_of(base, tuple(sorted([*kept, mixin], key=lambda m: m.order))))


def take_off(module: nn.Module, order: int) -> None:
    """Give back what `put_on` mixed in at this order; the last one leaves the module's own class."""
    mixins, base = _parts(type(module))
    kept = tuple(mixin for mixin in mixins if mixin.order != order)
    _become(module, _class_of(base, kept) if kept else base)


def covered(module: nn.Module) -> bool:
    """Whether somebody put a class of their own over ours (FSDP2 does), which would be lost by a change of class."""
    return hasattr(type(module), "lora_parts") and "lora_parts" not in vars(type(module))


def wears(module: nn.Module, order: int) -> bool:
    """Whether something of this order is mixed in."""
    return any(mixin.order == order for mixin in _parts(type(module))[0])


def base_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class without what `put_on` mixed in."""
    return _parts(kind)[1]


def patched_forward(module: nn.Module) -> bool:
    """Whether a replaced `forward` would hide an adapter. accelerate's hooks are known: `_become` follows them."""
    held = vars(module).get("_old_forward", vars(module).get("forward"))
    return held is not None and not _own_forward(held, module, type(module))


def has_own(module: nn.Module, name: str) -> bool:
    """Whether the module has its own attribute, tensor or child of this name; `hasattr` is slow to say no."""
    return any(name in own for own in (vars(module), module._parameters, module._buffers, module._modules))


_classes: dict[tuple[type[nn.Module], tuple[type[Mixin], ...]], type[nn.Module]] = {}


def _class_of(base: type[nn.Module], mixins: tuple[type[Mixin], ...]) -> type[nn.Module]:
    key = (base, mixins)
    if key not in _classes:
        name = "".join(mixin.prefix for mixin in mixins) + base.__name__
        namespace = {"__module__": base.__module__, "__qualname__": name, "lora_parts": key}
        _classes[key] = type(name, (*mixins, base), namespace)
    return _classes[key]


def _parts(kind: type[nn.Module]) -> tuple[tuple[type[Mixin], ...], type[nn.Module]]:
    base, mixins = getattr(kind, "lora_parts", (kind, ()))
    return mixins, base


def _rebuild(base: type[nn.Module], mixins: tuple[Any, ...]) -> nn.Module:
    made = tuple(mixin[0](mixin[1]) if isinstance(mixin, tuple) else mixin for mixin in mixins)
    kind = _class_of(base, made) if made else base
    return kind.__new__(kind)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class. accelerate's hooks hold the bound forward they replaced; it must be the one of the new class.

    Taken off again, such a hook leaves a bound forward on the instance.
    """
    before = type(module)
    module.__class__ = kind
    for name in ("_old_forward", "forward"):
        if _own_forward(vars(module).get(name), module, before):
            vars(module)[name] = types.MethodType(kind.forward, module)


def _own_forward(forward: object, module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether this is the bound method that the class or one of its bases defines."""
    return (
        isinstance(forward, types.MethodType)
        and forward.__self__ is module
        and any(vars(base).get("forward") is forward.__func__ for base in kind.__mro__)
    )


# -- the tree without what stands for adapters ------------------------------------------------------------------------


def base_modules(model: nn.Module, *, every_path: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the base alone: adapters are not entered, so the walk does not grow with their number.

    Args:
        every_path: a module that stands in several places comes with each of its paths.
    """
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen and not every_path:
            return
        seen.add(id(module))
        yield path, module
        holders = _holders(module)
        for name, child in module._modules.items():
            if child is not None and name not in holders:
                yield from walk(f"{path}.{name}" if path else name, child)

    return walk("", model)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters` of the base alone; tied ones come once."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), parameter


def names_by_parameter(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, list[str]]:
    """Identity of each parameter → its full names; a tied one has several."""
    names: dict[int, list[str]] = {}
    for path, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{path}.{name}")
    return names


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of names in `state_dict` under which adapters' tensors stand; a base may use the words itself."""
    return tuple(
        f"{path}.{holder}." if path else f"{holder}."
        for path, module in base_modules(model, every_path=True)
        for holder in _holders(module)
    )


def _holders(module: nn.Module) -> tuple[str, ...]:
    """The children of a module in which adapters stand."""
    return tuple(mixin.holder for mixin in _parts(type(module))[0] if mixin.holder)


def leave(module: nn.Module, kind: type[Adapting]) -> None:
    """Give the module its class back from `kind`, without what that kept there; the last one takes the state along."""
    take_off(module, kind.order)
    assert kind.holder is not None, f"{kind.__name__} keeps nothing on a module"
    delattr(module, kind.holder)
    if not isinstance(module, Adapting):
        delattr(module, "lora_state")
