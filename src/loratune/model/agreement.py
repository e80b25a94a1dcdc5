"""Whether a model's files and its config are of the same model: what transformers found when it loaded them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from loratune.errors import ModelError
from loratune.model.task import LANGUAGE_MODEL, Head, inside

_log = logging.getLogger("loratune")
# The number of a layer within the name of its tensor.
_NUMBERED = re.compile(r"\.(\d+)(?=\.)")


def not_found(info: dict[str, Any]) -> set[str]:
    """Weights that the files lack, or have in another shape."""
    return {*info.get("missing_keys", ()), *(key for key, _, _ in info.get("mismatched_keys", ()))}


def refuse_incomplete(name: str, info: dict[str, Any], fresh: Sequence[str] = ()) -> None:
    """Weights that the files lack would be drawn at random, which nobody asks for but of a new head."""
    missing = sorted(key for key in info.get("missing_keys", ()) if not inside(key, fresh))
    problems = [f"{name}: {key} is missing in its files" for key in missing]
    for key, there, expected in sorted(info.get("mismatched_keys", ())):
        if not inside(key, fresh):
            problems.append(f"{name}: {key} is {tuple(there)} in its files, {tuple(expected)} by its config")
    if problems:
        raise ModelError(problems, hint="the model's files are incomplete, or of another architecture than its config")


def refuse_more_layers(name: str, info: dict[str, Any], model: PreTrainedModel) -> None:
    """A list of layers that is longer in the files than by the config: what is loaded is not the model of these files.

    Layers that a family leaves out by design (`_keys_to_ignore_on_load_unexpected`) are not among the unexpected keys.
    """
    lists = {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # A model without its head has its layers under shorter names than a file of both.
    prefix = f"{model.base_model_prefix}."
    lists |= {prefix + path: length for path, length in lists.items() if prefix + path not in lists}
    found: dict[str, int] = {}
    for key in info.get("unexpected_keys", ()):
        for number in _NUMBERED.finditer(key):
            path, count = key[: number.start()], int(number[1]) + 1
            if count > lists.get(path, count):
                found[path] = max(found.get(path, 0), count)
    if found:
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        problems = [
            f"{name}: {path} has {count} layers in its files, {lists[path]} by its config"
            + (f" (num_hidden_layers: {layers})" if layers is not None and lists[path] == max(0, layers) else "")
            for path, count in found.items()
        ]
        raise ModelError(problems, hint="the files are of a deeper model: correct its config.json, or take its own")


def say_unused(name: str, info: dict[str, Any], head: Head) -> None:
    """Weights that the config has no place for may be another head's, or a sign that it is not theirs."""
    unused = sorted(info.get("unexpected_keys", ()))
    if unused and head == LANGUAGE_MODEL:
        shown = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
        _log.warning("%s: %d tensors in its files are no part of the model: %s", name, len(unused), shown)
