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
from tests.files.killed import NEW, OLD, SCENARIOS, SET, fill

ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


AFTER: dict[str, dict[str, bytes]] = {
    "together, over the old set": NEW,
    "together, into an empty folder": NEW,
    "together, first time": NEW,
    "together, among other files": OLD | NEW,
    "together, without an exchange": NEW,
    "new folder, over an old one": NEW | {"inner/d": b"new d"},
    "new folder, first time": NEW | {"inner/d": b"new d"},
    "new folder, without an exchange": NEW | {"inner/d": b"new d"},
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
    old, new = SCENARIOS[scenario].before, AFTER[scenario]
    seen = []
    last = max(int(path.name) for path in tmp_path.iterdir() if "." not in path.name)
    for place in tmp_path.iterdir():
        beside = [path.name for path in place.iterdir()]
        if SCENARIOS[scenario].at_once:
            assert tree(place / "it") in (old, new), f"{place.name}: what a reader that recovers nothing sees"
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


def test_folders_of_somebody_with_such_names_are_left_alone(tmp_path: Path) -> None:
    """Ours have the number of a process in their name."""
    for name in (".it.mine.old", ".it.old", ".it.staged", ".it.mine.staged", ".it.12.mine.old"):
        fill(tmp_path / name)
    files.finish(tmp_path / "it")
    assert not (tmp_path / "it").exists()
    files.write_together(tmp_path / "it", NEW)
    assert tree(tmp_path / "it") == NEW
    with files.new_folder(tmp_path / "it") as folder:
        (folder / "a").write_bytes(b"new")
    for name in (".it.mine.old", ".it.old", ".it.staged", ".it.mine.staged", ".it.12.mine.old"):
        assert tree(tmp_path / name) == OLD


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


def in_one_step(folder: Path) -> bool:
    """Whether NEW is written into this folder by putting another one in its place."""
    before = folder.stat().st_ino
    files.write_together(folder, NEW)
    assert (tree(folder) or {}).items() >= NEW.items()
    assert not [path for path in folder.resolve().parent.iterdir() if path.name.startswith(".")]
    return folder.stat().st_ino != before


def test_what_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set", "more", "inner", "sealed", "here", "real"):
        fill(tmp_path / name, SET)
    (tmp_path / "more" / "log").write_bytes(b"")
    (tmp_path / "inner" / "c").mkdir()
    (tmp_path / "inner" / "c" / "thesis").write_bytes(b"work")
    (tmp_path / "link").symlink_to("real")
    assert in_one_step(tmp_path / "set")
    assert in_one_step(tmp_path / "more" / ".." / "set")
    assert not in_one_step(tmp_path / "more")
    assert (tmp_path / "more" / "log").exists()
    assert not in_one_step(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(OSError, match="inner"):
        files.write_together(tmp_path / "inner", NEW)
    assert (tmp_path / "inner" / "c" / "thesis").read_bytes() == b"work"

    monkeypatch.chdir(tmp_path / "here")
    assert not in_one_step(tmp_path / "here"), "this process works there"
    assert not in_one_step(Path())
    assert Path("a").read_bytes() == NEW["a"]

    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "sealed")
    assert not in_one_step(tmp_path / "sealed"), "who may not write into it may not replace it either"


def test_a_parent_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "it", SET)
    mkdir = Path.mkdir

    def refuse(path: Path, *args: Any, **more: Any) -> None:
        if path.parent == tmp_path and not path.exists():
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *args, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert not in_one_step(tmp_path / "it")


def test_permissions_of_the_folder_stay(tmp_path: Path) -> None:
    for mode in (0o700, 0o2770, 0o1777):
        folder = tmp_path / f"{mode:o}"
        fill(folder, SET)
        folder.chmod(mode)
        assert in_one_step(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == mode


def test_a_file_that_comes_while_the_set_is_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "it", SET)
    fsync = os.fsync

    def meanwhile(handle: int) -> None:
        (tmp_path / "it" / "log").write_bytes(b"a line")
        monkeypatch.setattr(os, "fsync", fsync)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", meanwhile)
    assert in_one_step(tmp_path / "it")
    assert tree(tmp_path / "it") == NEW | {"log": b"a line"}


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


def test_what_the_dead_left_half_written_is_swept_away(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = os.getppid()
    for name in (
        f".a.{dead.pid}.tmp",
        f".b.{os.getpid()}.tmp",
        f".c.{living}.tmp",
        ".d.tmp",
        "e.1.tmp",
        f".f.{2**70}.tmp",
    ):
        (tmp_path / name).write_bytes(b"half")
    fill(tmp_path / f".g.{dead.pid}.tmp")
    assert files.is_temporary(tmp_path / ".a.1.tmp")
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f".c.{living}.tmp", ".d.tmp", f".f.{2**70}.tmp", "e.1.tmp"]
    )
    files.sweep(tmp_path / "nowhere")


def test_json() -> None:
    assert files.to_json({"b": [1, 2], "a": "é"}) == '{\n  "a": "é",\n  "b": [\n    1,\n    2\n  ]\n}\n'.encode()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            files.to_json({"x": bad})


def test_lines_are_added(tmp_path: Path) -> None:
    for line in ("first", "zweite ü"):
        files.append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "first\nzweite ü\n"
