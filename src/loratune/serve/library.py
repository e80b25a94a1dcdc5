"""The adapters that may be asked for by name; as many as there is room for are on the model.

Only the worker's thread comes here, between two steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune.adapt import attach
from loratune.adapter import adapter_folder, read_adapter
from loratune.engine import Engine
from loratune.errors import AdapterStateError, LoratuneError


class NoRoomError(LoratuneError):
    """Every place for an adapter is taken by one that is answering."""


class UnknownNameError(LoratuneError):
    """No adapter, and not the base, has this name."""


class Library:
    """Names → folders, and which of them are loaded.

    Attributes:
        base: the name of the model without adapters. room: how many adapters are on the model at most.
    """

    def __init__(self, engine: Engine, tokenizer: Any, base: str, room: int) -> None:
        self.engine, self.tokenizer, self.base, self.room = engine, tokenizer, base, room
        self._folders: dict[str, Path] = {}
        # Loaded ones, the one asked for last at the end.
        self._loaded: OrderedDict[str, None] = OrderedDict()

    @property
    def folders(self) -> Mapping[str, Path]:
        return self._folders

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def add(self, name: str, path: str | Path) -> None:
        """Know an adapter by this name, and load it.

        Raises:
            AdapterStateError: the name is taken, or the adapter is one that cannot share a batch.
            AdapterFileError: it is damaged, or of another base or tokenizer. NoRoomError: nothing can make way.
        """
        if name == self.base or name in self._folders:
            raise AdapterStateError(f"{name!r} is taken already", hint="unload it first, or choose another name")
        folder = adapter_folder(path)
        read_adapter(folder)  # complete and sound, before another one makes way
        self._folders[name] = folder
        try:
            self._load(name)
        except LoratuneError:
            del self._folders[name]
            raise

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownNameError: there is none of this name. NoRoomError: it is answering now.
        """
        if name not in self._folders:
            raise UnknownNameError(f"no adapter {name!r}", hint=f"there are {', '.join(self._folders) or 'none'}")
        if self.engine.uses(name):
            raise NoRoomError(f"{name!r} is answering", hint="unload it when its answers have ended")
        self._unload(name)
        del self._folders[name]

    def ready(self, name: str) -> str | None:
        """What the engine calls the model of this name: an adapter, loaded by now, or None for the base.

        Raises:
            UnknownNameError, NoRoomError, AdapterFileError.
        """
        if name == self.base:
            return None
        if name not in self._folders:
            names = ", ".join((self.base, *self._folders))
            raise UnknownNameError(f"no model {name!r}", hint=f"there are {names}")
        if name in self._loaded:
            self._loaded.move_to_end(name)
        else:
            self._load(name)
        return name

    def _load(self, name: str) -> None:
        while len(self._loaded) >= self.room:
            idle = next((other for other in self._loaded if not self.engine.uses(other)), None)
            if idle is None:
                raise NoRoomError(
                    f"all {self.room} places for adapters are answering", hint="ask again later, or --max-adapters more"
                )
            self._unload(idle)
        folder, engine = self._folders[name], self.engine
        if engine.lora is None:
            engine.lora = attach(engine.model, folder, name=name, tokenizer=self.tokenizer)
            engine.lora.activate()
        else:
            engine.lora.load(folder, name, tokenizer=self.tokenizer)
        try:
            engine.refresh()
        except AdapterStateError as error:
            engine.lora.remove(name)
            engine.refresh()
            raise AdapterStateError(
                error.problems, hint="`loratune merge` it, and serve the merged model as a base"
            ) from None
        self._loaded[name] = None

    def _unload(self, name: str) -> None:
        if name in self._loaded:
            assert self.engine.lora is not None, "one is loaded"
            self.engine.lora.remove(name)
            self.engine.refresh()
            del self._loaded[name]
