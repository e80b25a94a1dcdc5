"""The adapters that may be asked for by name; as many as there is room for are on the model.

Only the worker's thread changes anything here, between two steps; others read what is known and loaded.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune.adapt import attach
from loratune.adapter import adapter_folder, read_adapter
from loratune.engine import Engine
from loratune.errors import AdapterFileError, AdapterStateError, LoratuneError
from loratune.run.task import require_language_model, saved_head

_log = logging.getLogger("loratune.serve")


class NoRoomError(LoratuneError):
    """Every place for an adapter is taken by one that is answering."""


class UnknownNameError(LoratuneError):
    """No adapter, and not the base, has this name."""


class LostError(LoratuneError):
    """A known adapter cannot be loaded any more."""


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
        self._lock = threading.Lock()

    @property
    def folders(self) -> Mapping[str, Path]:
        """Name → folder as they are now: a copy."""
        with self._lock:
            return dict(self._folders)

    @property
    def loaded(self) -> tuple[str, ...]:
        with self._lock:
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
        require_language_model(saved_head(None, read_adapter(folder)), "serve", "`loratune eval` measures it")
        self._load(name, folder)
        with self._lock:
            self._folders[name] = folder

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
        with self._lock:
            del self._folders[name]

    def refuse_unknown(self, name: str) -> None:
        """Raise UnknownNameError unless it is the base's, or an adapter's."""
        if name != self.base and name not in self._folders:
            names = ", ".join((self.base, *self._folders))
            raise UnknownNameError(f"no model {name!r}", hint=f"there are {names}")

    def ready(self, name: str) -> None:
        """See that the model of this name, an adapter or the base, is loaded.

        Raises:
            UnknownNameError, NoRoomError. LostError: its files are gone or damaged, or no longer fit.
        """
        self.refuse_unknown(name)
        if name == self.base:
            return
        if name in self._loaded:
            with self._lock:
                self._loaded.move_to_end(name)
            return
        try:
            self._load(name, self._folders[name])
        except (AdapterFileError, AdapterStateError) as error:
            # Who asks has done nothing wrong, and paths of this machine are not theirs to know.
            _log.error("%s", error)
            raise LostError(f"{name!r} cannot be loaded any more", hint="the server's log says why") from error

    def _load(self, name: str, folder: Path) -> None:
        """Put an adapter on the model; another one makes way only when this one is known to be good."""
        idle = self._idle() if len(self._loaded) >= self.room else None
        engine = self.engine
        try:
            if engine.lora is None:
                engine.lora = attach(engine.model, folder, name=name, tokenizer=self.tokenizer)
                engine.lora.activate()
            else:
                engine.lora.load(folder, name, tokenizer=self.tokenizer)
            _refuse_alone(engine, name)
            if idle is not None:
                self._forget(idle)
            engine.refresh()
        except BaseException:  # out of memory too: what is on the model and what is said to be must agree
            if engine.lora is not None and name in engine.lora.names:
                engine.lora.remove(name)
                engine.refresh()
            raise
        with self._lock:
            self._loaded[name] = None

    def _idle(self) -> str:
        """The one asked for least lately that is not answering."""
        for name in self._loaded:
            if not self.engine.uses(name):
                return name
        raise NoRoomError(
            f"all {self.room} places for adapters are answering", hint="ask again later, or --max-adapters more"
        )

    def _unload(self, name: str) -> None:
        if name in self._loaded:
            self._forget(name)
            self.engine.refresh()

    def _forget(self, name: str) -> None:
        assert self.engine.lora is not None, "one is loaded"
        self.engine.lora.remove(name)
        with self._lock:
            del self._loaded[name]


def _refuse_alone(engine: Engine, name: str) -> None:
    """Raise AdapterStateError where an adapter cannot share a batch with others."""
    try:
        engine.refuse_unmixable(name)
    except AdapterStateError as error:
        raise AdapterStateError(
            error.problems, hint="`loratune merge` it, and serve the merged model as a base"
        ) from None
