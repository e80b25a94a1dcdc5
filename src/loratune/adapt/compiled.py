"""Models that `torch.compile` has put a wrapper around, as a whole or in part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

# Under this name `torch.compile`'s wrapper holds what it was given.
_COMPILED = "_orig_mod"


def inside_compiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` put its wrapper around, whose own names are those of files; any other as it is."""
    inside = model._modules.get(_COMPILED)
    return model if inside is None else inside


def compiled_problems(paths: Sequence[str]) -> Iterator[str]:
    """Why none of these paths could stand in a file."""
    wrapped = [path for path in paths if _COMPILED in path.split(".")]
    if wrapped:
        where = wrapped[0].partition(f".{_COMPILED}")[0]
        yield (
            f"{where} is wrapped by torch.compile, whose name {_COMPILED!r} would stand in the adapter's files: "
            f"compile it in place ({where}.compile()), or the whole model"
        )
