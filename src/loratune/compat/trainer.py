"""Training a model with adapters in transformers' Trainer and in those that TRL derives from it.

Such a trainer takes the model as it is, but it knows PEFT's own class and no other: its checkpoints hold the whole
base, a base that transformers quantised is refused, and an adapter of the output head may be read past.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from loratune.adapt import Adapters, adapters
from loratune.adapter import read_adapter, to_keys
from loratune.compat.peft.state import live_state, read_state, write_state
from loratune.errors import AdapterFileError, AdapterStateError
from loratune.files import write_bytes
from loratune.lora import adapter_prefixes, base_modules

# Beside PEFT's files, where these do not hold the trained tensors as they are: they go on from here.
LIVE = "adapter_in_training.safetensors"

# Read by transformers' Trainer: without it a quantised base is refused as one that nothing was added to.
_ADAPTED = "_hf_peft_config_loaded"


class AdapterTraining:
    """Mixed in before the trainer: `class MyTrainer(AdapterTraining, Trainer)`, and so with TRL's.

    Its checkpoints and what `save_model` writes are the adapters as PEFT's files ("default" in the folder itself, each
    other in a folder of its name there), from which it resumes and loads the best ones.

    Raises:
        AdapterStateError: the model has no adapters; in the first step: no gradient reached the one of its output head.
    """

    model: Any
    args: Any
    state: Any
    processing_class: Any
    _head_seen = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = args[0] if args else kwargs.get("model")
        adapters(model)  # type: ignore[arg-type]  # refused where there are none
        with _recognised(model):
            super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not self._head_seen:
            _refuse_unseen_head(self.model)
            self._head_seen = True
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        del state_dict
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        handle = adapters(self.model)
        for name, place in _places(handle, folder):
            handle.save(place, name)
            if _fits_in_files(handle, name):
                (place / LIVE).unlink(missing_ok=True)
            else:
                tensors = {key: tensor.cpu().clone() for key, tensor in _state(handle, name).items()}
                write_bytes(place / LIVE, safetensors.torch.save(tensors))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        del model
        self._read(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._read(Path(self.state.best_model_checkpoint))

    def _read(self, folder: Path) -> None:
        handle = adapters(self.model)
        for name, place in _places(handle, folder):
            if (place / LIVE).exists():
                _restore(handle, name, place / LIVE)
            else:
                write_state(handle, name, to_keys(read_adapter(place)), strict=True)


def _places(handle: Adapters, folder: Path) -> list[tuple[str, Path]]:
    """Where each adapter's files are in a checkpoint, as PEFT has it."""
    return [(name, folder / (name if name != "default" else "")) for name in handle.names]


def _fits_in_files(handle: Adapters, name: str) -> bool:
    """Whether PEFT's files hold what trains as it is; a master finer than the base is rounded there, for example."""
    live, filed = live_state(handle, name), read_state(handle, name)
    return all(filed[key].shape == live[key].shape and filed[key].dtype == live[key].dtype for key in live)


def _state(handle: Adapters, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter, with the start that its update counts from; they share the live ones' memory."""
    own = tuple(f"{prefix}{name}." for prefix in adapter_prefixes(handle.model))
    return {key: tensor for key, tensor in handle.model.state_dict().items() if key.startswith(own)}


def _restore(handle: Adapters, name: str, path: Path) -> None:
    try:
        saved = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{path} is damaged ({error})", hint="go on from an earlier checkpoint") from None
    live = _state(handle, name)
    if {key: tensor.shape for key, tensor in live.items()} != {key: tensor.shape for key, tensor in saved.items()}:
        raise AdapterFileError(f"{path} is of another adapter than {name!r} here", hint="attach with the same config")
    for key, tensor in live.items():
        tensor.copy_(saved[key])


@contextmanager
def _recognised(model: Any) -> Iterator[None]:
    """Inside the block the model says that something was added to it.

    Not for longer: to `save_pretrained` and others it would say that it holds PEFT's own layers.
    """
    before = vars(model).get(_ADAPTED)
    vars(model)[_ADAPTED] = True
    try:
        yield
    finally:
        if before is None:
            del vars(model)[_ADAPTED]
        else:
            vars(model)[_ADAPTED] = before


def _refuse_unseen_head(model: Any) -> None:
    """TRL computes log-probabilities from the head's weight, past what is added to its product."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    handle = adapters(model)
    modules = dict(base_modules(handle.model))
    for name in handle.active:
        for path, term in handle.terms(name).items():
            tensors = [tensor for tensor in term.parameters() if tensor.requires_grad]
            if modules.get(path) is head and tensors and all(t.grad is None for t in tensors):
                raise AdapterStateError(
                    f"no gradient reached adapter {name!r} in {path}: this trainer reads the weight alone",
                    hint=f"leave {path} out of target_modules, or put it into modules_to_save",
                )
