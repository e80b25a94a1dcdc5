"""Names and what is loaded: a refusal leaves both as they were."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loratune.errors import LoratuneError
from loratune.serve.library import LostError
from loratune.serve.refusals import _STATUS as _REFUSED
from tests.serve.conftest import Shelf, service


@pytest.fixture
def library(shelf: Shelf) -> Any:
    return service(shelf, "a", "b", adapters=2).library


def state(library: Any) -> Any:
    engine = library.engine
    return dict(library.folders), library.loaded, engine.adapters, engine.lora.names


def test_what_is_known_is_a_copy(library: Any, shelf: Shelf) -> None:
    before, loaded = library.folders, library.loaded
    library.add("late", shelf.adapters / "late")
    assert set(before) == {"a", "b"}
    assert loaded == ("a", "b")
    assert library.loaded == ("b", "late")


@pytest.mark.parametrize("name", ["dora", "stranger"])
def test_one_that_is_refused_takes_nobodys_place(library: Any, shelf: Shelf, name: str) -> None:
    before = state(library)
    with pytest.raises(LoratuneError):
        library.add(name, shelf.adapters / name)
    assert state(library) == before


def test_one_that_is_damaged_takes_nobodys_place(library: Any, shelf: Shelf, tmp_path: Path) -> None:
    """A known one whose file was damaged after it had made way."""
    folder = shutil.copytree(shelf.adapters / "late", tmp_path / "late")
    library.add("late", folder)
    library.ready("a")
    assert library.loaded == ("late", "a")
    library.ready("b")
    assert library.loaded == ("a", "b")
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    before = state(library)
    with pytest.raises(LostError, match="'late' cannot be loaded any more") as caught:
        library.ready("late")
    assert str(tmp_path) not in str(caught.value)  # whoever asks is told no path
    assert state(library) == before
    assert _REFUSED[LostError] == 500
    shutil.rmtree(folder)
    shutil.copytree(shelf.adapters / "dora", folder)  # sound, and one that cannot share a batch
    with pytest.raises(LostError):
        library.ready("late")
    assert state(library) == before


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
def test_a_load_that_breaks_off_leaves_what_was_there(
    library: Any, shelf: Shelf, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = library.engine
    refresh, told = engine.refresh, []

    def once() -> None:
        told.append(engine.lora.names)
        if len(told) == 1:
            raise error
        refresh()

    library.remove("b")
    before = state(library)
    monkeypatch.setattr(engine, "refresh", once)
    with pytest.raises(type(error)):
        library.add("late", shelf.adapters / "late")
    assert "late" in told[0]
    assert state(library) == before
    library.add("late", shelf.adapters / "late")
    assert library.loaded == ("a", "late")


def test_numbers_too_large_for_the_base_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    """Finite as they are stored, and infinite in the dtype that the base computes in."""
    folder = shutil.copytree(shelf.adapters / "a", tmp_path / "large")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    library = service(shelf).library
    library.engine.model.half()
    with pytest.raises(LoratuneError, match="infinity"):
        library.add("large", folder)
    assert library.loaded == ()
    library.add("a", shelf.adapters / "a")
