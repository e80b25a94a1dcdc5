"""Writing: JSON's form, and that a kill at any moment leaves the old content or the new (BEHAVIOUR 33)."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loratune import files
from tests.files.killed import NEW, OLD, SCENARIOS, fill

ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


AFTER: dict[str, dict[str, bytes]] = {
    "together, over old files": OLD | NEW,
    "together, first time": NEW,
    "new folder, over an old one": NEW | {"inner/d": b"new d"},
    "new folder, first time": NEW | {"inner/d": b"new d"},
    "one file": OLD | {"a": NEW["a"]},
}


def remains(place: Path) -> list[dict[str, bytes] | None]:
    """What is found under the name now, and what would be found if that were deleted by hand."""
    files.recover(place / "it")
    found = [tree(place / "it")]
    shutil.rmtree(place / "it", ignore_errors=True)
    files.recover(place / "it")
    return [*found, tree(place / "it")]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, scenario: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.files.killed", scenario, str(tmp_path), "again"],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    old = OLD if SCENARIOS[scenario][0] else None
    new = AFTER[scenario]
    seen = []
    last = max(int(path.name) for path in tmp_path.iterdir() if "." not in path.name)
    for place in tmp_path.iterdir():
        beside = [path.name for path in place.iterdir()]
        found, later = remains(place)
        assert later in (None, old), "half of an old folder must not come back"
        if scenario == "one file" and found is not None:
            found = {name: content for name, content in found.items() if not name.endswith(".tmp")}
        assert found in (old, new, {} if old is None else old), place.name
        seen.append(found == new)
        if place.name == str(last):
            assert found == new
            assert beside == ["it"], "nothing stays behind"
    assert last > 5
    assert {True, False} == set(seen), "kills before and after the moment that counts"


def test_a_folder_moved_aside_comes_back(tmp_path: Path) -> None:
    fill(tmp_path / ".a*b.123.old")
    fill(tmp_path / ".axb.123.old")
    files.recover(tmp_path / "a*b")
    assert tree(tmp_path / "a*b") == OLD
    assert (tmp_path / ".axb.123.old").exists(), "another folder's"


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "it")

    def interrupted() -> None:
        with files.new_folder(tmp_path / "it") as folder:
            (folder / "a").write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert tree(tmp_path / "it") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "it")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: files.write_bytes(tmp_path / "it" / "a", b"new"),
        lambda: files.write_together(tmp_path / "it", NEW),
    ):
        with pytest.raises(OSError, match="No space"):
            write()
        found = {name: content for name, content in (tree(tmp_path / "it") or {}).items() if ".staged" not in name}
        assert found == OLD
    monkeypatch.undo()
    files.write_together(tmp_path / "it", NEW)
    assert tree(tmp_path / "it") == OLD | NEW


def test_content_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        events.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        fsync(handle)

    def noted_replace(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write_bytes(tmp_path / "a", b"x")
    assert events == ["sync file", "rename", "sync folder"]


def test_json() -> None:
    assert files.to_json({"b": [1, 2], "a": "é"}) == '{\n  "a": "é",\n  "b": [\n    1,\n    2\n  ]\n}\n'.encode()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            files.to_json({"x": bad})


def test_lines_are_added(tmp_path: Path) -> None:
    for line in ("first", "zweite ü"):
        files.append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "first\nzweite ü\n"
