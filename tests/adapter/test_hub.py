"""Adapters by the id of a hub: found in its cache, missing, shadowed by a folder; never a pickle (BEHAVIOUR 32)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import loratune as lt
from loratune.adapter import adapter_folder
from loratune.errors import AdapterFileError
from tests.adapt.model import CONFIG, IDS, attached, bits, net, picture

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached; the working folder is empty too."""
    root, here = tmp_path / "cache", tmp_path / "here"
    root.mkdir()
    here.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.chdir(here)
    return root


def put(cache: Path, name: str, files: Path, *, commit: str = COMMIT, revision: str = "main") -> Path:
    """The files as the hub's library keeps them: blobs, a snapshot of links to them, and what a revision means."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for path in files.iterdir():
        blob = repository / "blobs" / f"{commit[:8]}{path.name}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def files(tmp_path: Path) -> Path:
    attached()[1].save(tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize("name", ["owner/name", "o-1/na.me_2", "Owner/name-of.v1"])
def test_an_id_is_found_in_the_cache(cache: Path, files: Path, name: str) -> None:
    snapshot = put(cache, name, files)
    assert adapter_folder(name) == snapshot
    model = net()
    handle = lt.attach(model, name)
    assert bits(model(IDS)) == bits(attached()[0](IDS))
    handle.load(name, "second")
    handle.save("again")
    for path in files.iterdir():
        assert path.read_bytes() == Path("again", path.name).read_bytes(), path.name
    assert {path.name for path in snapshot.iterdir()} == {path.name for path in files.iterdir()}, "it is only read"


def test_a_revision_is_another_snapshot(cache: Path, files: Path, tmp_path: Path) -> None:
    handle = lt.attach(net(), CONFIG.replace(r=3))
    handle.save(tmp_path / "old")
    old = put(cache, "owner/name", tmp_path / "old", commit=OTHER, revision="v1")
    new = put(cache, "owner/name", files)
    assert adapter_folder("owner/name") == new
    assert adapter_folder("owner/name", revision="v1") == adapter_folder("owner/name", revision=OTHER) == old


def test_an_id_that_is_nowhere_is_refused_naming_both_ways(cache: Path, files: Path) -> None:
    put(cache, "owner/another", files)
    model, handle = attached()
    before = picture(model, handle)
    with pytest.raises(AdapterFileError) as caught:
        handle.load("owner/name", "second")
    (problem,) = caught.value.problems
    assert problem.startswith("owner/name: no such folder, and not all of it is in the cache (")
    assert "\n" not in problem
    assert caught.value.hint == "an adapter is a folder or a hub id like owner/name; unset HF_HUB_OFFLINE once"
    assert picture(model, handle) == before
    plain = net()
    before = picture(plain)
    with pytest.raises(AdapterFileError, match="owner/name: no such folder"):
        lt.attach(plain, "owner/name")
    assert picture(plain) == before


@pytest.mark.parametrize("name", ["nowhere", "./owner/name", "/owner/name", "a/b/c", "owner/", "-x/y", "owner/na me"])
def test_what_is_no_id_is_a_folder_that_is_missing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, files: Path, name: str
) -> None:
    def asked(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    for given in (name, Path("owner/name")):
        with pytest.raises(AdapterFileError, match=r"no such folder\nhint: an adapter is a folder or a hub id"):
            lt.attach(net(), given)


def test_a_local_folder_of_the_name_wins(cache: Path, files: Path, tmp_path: Path) -> None:
    lt.attach(net(), CONFIG.replace(r=3)).save(tmp_path / "other")
    put(cache, "owner/name", tmp_path / "other")
    assert lt.attach(net(), "owner/name").config().r == 3
    shutil.copytree(files, "owner/name")
    assert adapter_folder("owner/name") == Path("owner/name")
    assert lt.attach(net(), "owner/name").config().r == 2
    shutil.rmtree("owner/name")
    Path("owner/name").mkdir()
    with pytest.raises(AdapterFileError, match="holds no adapter"):
        lt.attach(net(), "owner/name")


def test_a_home_folder_is_expanded(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert adapter_folder("~/files") == files
    lt.attach(net(), "~/files")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_in_the_cache_is_never_opened(cache: Path, files: Path, tmp_path: Path) -> None:
    (files / "adapter_model.safetensors").unlink()
    torch.save(Trap(tmp_path / "opened"), files / "adapter_model.bin")
    put(cache, "owner/name", files)
    with pytest.raises(AdapterFileError, match="is a pickle, which can run code"):
        lt.attach(net(), "owner/name")
    assert not (tmp_path / "opened").exists()


def test_pickles_and_code_are_never_fetched(monkeypatch: pytest.MonkeyPatch, cache: Path, files: Path) -> None:
    """What would be fetched, by the rule that is given to the hub's library."""
    from huggingface_hub.utils import filter_repo_objects

    wanted: list[Any] = []
    snapshot = put(cache, "owner/name", files)

    def fetch(name: str, **settings: Any) -> str:
        wanted.append((name, settings["allow_patterns"], settings.get("ignore_patterns")))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    lt.attach(net(), "owner/name")
    ((name, allowed, ignored),) = wanted
    assert name == "owner/name"
    harmless = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "loratune.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    others = ["adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.safetensors"]
    others += ["checkpoint-1/adapter_model.safetensors", "modeling.py", "run.sh", "rng_state.pth", "scaler.pkl"]
    kept = list(filter_repo_objects(harmless + others, allow_patterns=allowed, ignore_patterns=ignored))
    assert kept == harmless


@pytest.mark.parametrize("file", ["tokenizer.pkl", "tokenizer.py", "tokenizer/module.py", "tokenizer_weights.bin"])
def test_whatever_is_called_tokenizer_is_not_fetched(
    monkeypatch: pytest.MonkeyPatch, cache: Path, files: Path, file: str
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    snapshot = put(cache, "owner/name", files)
    kept: list[str] = []

    def fetch(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        kept.extend(filter_repo_objects([file], allow_patterns=allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    lt.attach(net(), "owner/name")
    assert kept == []
