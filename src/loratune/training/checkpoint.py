"""Everything that a run needs to go on as if it had never stopped, as safetensors and JSON.

A checkpoint is a folder that appears complete or not at all. Data order, dropout masks and the learning rate follow
from (seed, step), so no generator's state is kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from loratune.adapt import Adapters
from loratune.files import new_folder, to_json
from loratune.training.loop import Progress
from loratune.training.sharding import divided_like, whole

_TENSORS = "tensors.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    lora: Adapters,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    keep: int,
    run: str = "",
    write: bool = True,
) -> Path:
    """Write `folder/step-N` and drop all but the newest `keep` until then, and what is of later steps: a run that goes
    on from an earlier one found those damaged.

    What is sharded is written whole, so that another number of processes can go on; all of them must call this.

    Args:
        run: the identity of the run that it is of.
        write: whether this process is the one that writes.
    """
    tensors = {f"adapter.{i}": p.detach() for i, p in enumerate(lora.parameters())}
    leaves = dict(_leaves(optimizer.state_dict()["state"]))
    scalars = {name: value for name, value in leaves.items() if not isinstance(value, Tensor)}
    # Tensors that all parameters have in common are written once.
    first = {id(value): name for name, value in reversed(leaves.items()) if isinstance(value, Tensor)}
    shared = {name: first[id(value)] for name, value in leaves.items() if first.get(id(value), name) != name}
    tensors |= {f"optimizer.{name}": leaves[name] for name in first.values()}
    tensors |= {f"best.{i}": tensor for i, tensor in enumerate(progress.best)}
    tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    path = _path(folder, progress.step)
    if not write:
        return path
    state: dict[str, Any] = {
        "run": run,
        "step": progress.step,
        "micro_batch_tokens": progress.micro_batch_tokens,
        # JSON has no infinity; None says that nothing was validated yet.
        "best_val": progress.best_val if progress.best_step else None,
        "best_step": progress.best_step,
        "worse": progress.worse,
        "stopped_early": progress.stopped_early,
        "optimizer_scalars": scalars,
        "optimizer_shared": shared,
    }
    with new_folder(path) as temporary:
        # Straight to the file: as bytes first, they would be held twice.
        safetensors.torch.save_file(tensors, temporary / _TENSORS)
        state["sha256"] = _hash_of(temporary / _TENSORS)
        (temporary / _STATE).write_bytes(to_json({**state, "state_sha256": _hash_of_state(state)}))
    there = _all(folder)
    until = [other for other in there if other.name <= path.name]
    for other in there:
        if other not in until[-keep:]:
            shutil.rmtree(other)
    return path


def latest_checkpoint(folder: Path, run: str = "") -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of this run whose content matches its hash, and what was wrong with newer ones."""
    damaged: list[str] = []
    for path in reversed(_all(folder)):
        try:
            found = _read(path)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            damaged.append(f"{path.name} is damaged ({error})")
            continue
        if found.state.get("run") == run:
            return found, damaged
        damaged.append(f"{path.name} is of another run")
    return None, damaged


def restore(checkpoint: Checkpoint, lora: Adapters, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's tensors back into a freshly attached adapter and a fresh optimizer."""
    tensors, state = checkpoint.tensors, checkpoint.state
    parameters = lora.parameters()
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(divided_like(tensors[f"adapter.{i}"], parameter))
    saved = optimizer.state_dict()
    leaves = {key.removeprefix("optimizer."): value for key, value in tensors.items() if key.startswith("optimizer.")}
    shared = {name: leaves[first] for name, first in state["optimizer_shared"].items()}
    moments = _tree(leaves | shared | state["optimizer_scalars"])
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    divided = {int(index): _divided(values, owners[int(index)]) for index, values in moments.items()}
    optimizer.load_state_dict({**saved, "state": divided})
    number = sum(key.startswith("best.") for key in tensors)
    best = [divided_like(tensors[f"best.{i}"], parameters[i]) for i in range(number)]
    progress = Progress(state["step"], state["micro_batch_tokens"], best=best, worse=state["worse"])
    progress.stopped_early = state["stopped_early"]
    if state["best_val"] is not None:
        progress.best_val, progress.best_step = state["best_val"], state["best_step"]
    return progress


def _leaves(values: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dictionaries hold, by their keys with dots between: bitsandbytes nests what it keeps."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dictionaries that hold these."""
    found: dict[str, Any] = {}
    for name, value in leaves.items():
        *above, last = name.split(".")
        inner = found
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return found


def _divided(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """What an optimizer keeps of a parameter, as the parameter itself is kept."""
    return {key: divided_like(v, parameter) if isinstance(v, Tensor) else v for key, v in values.items()}


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / _STATE).read_bytes())
    if not isinstance(state, dict) or state.pop("state_sha256") != _hash_of_state(state):
        raise ValueError("its state does not match its hash")
    if _hash_of(path / _TENSORS) != state["sha256"]:
        raise ValueError("its tensors do not match their hash")
    return Checkpoint(state["step"], safetensors.torch.load_file(path / _TENSORS), state)


def _hash_of_state(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(state)).hexdigest()


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
