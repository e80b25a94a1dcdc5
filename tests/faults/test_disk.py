"""A disk that is full, sealed or not ours: an error that says so and no traceback; with space again, the same bits."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Place, Whole, goes_on
from tests.faults.moments import PHASES
from tests.faults.warmed import Ended, Warmed

Counted = Callable[..., None]
EACH = 5
ALWAYS = {("checkpoint", 1)}
SPACE, ROOM, SEALED = "No space left on device", "File too large", "Read-only file system"


def refused(ended: Ended, why: str, code: int | None = None) -> None:
    assert ended.is_typed, ended.printed
    assert (ended.code if code is None else code) == 1, ended.printed
    assert f"cannot be written: {why}" in ended.printed
    assert "--out" in ended.printed


def still_readable(warmed: Warmed, place: Place) -> None:
    for name in ("show", "eval"):
        more = ["--data", str(place.data)] if name == "eval" else []
        looked = warmed("command", words=[name, str(place.run), *more])
        assert looked.is_typed, looked.printed


@pytest.mark.parametrize(
    ("phase", "index"),
    [
        pytest.param(phase, index, marks=() if (phase, index) in ALWAYS else pytest.mark.full)
        for phase in PHASES
        for index in range(EACH)
    ],
)
def test_full_from_a_moment_on(
    phase: str, index: int, place: Place, whole: Whole, warmed: Warmed, counted: Counted
) -> None:
    """Every file that is opened for writing, every folder made and every flush fails from then on."""
    moments = whole.of(phase)
    fault = {"what": "full", "at": moments[index * len(moments) // EACH]}
    ended = warmed("watched", words=place.train, place=str(place.root), fault=fault)
    refused(ended, SPACE)
    still_readable(warmed, place)
    goes_on(warmed, place, whole)
    counted("moment of a full disk")


@pytest.mark.parametrize(
    "size", [40_000, *(pytest.param(size, marks=pytest.mark.full) for size in (4096, 10_000, 56_000))]
)
def test_limit_on_the_size_of_files(size: int, place: Place, whole: Whole, warmed: Warmed, counted: Counted) -> None:
    """The system itself refuses in the middle of a write."""
    refused(warmed("limited", words=place.train, file_bytes=size), ROOM)
    still_readable(warmed, place)
    goes_on(warmed, place, whole)
    counted("size of a full disk")


@pytest.mark.full
def test_limit_on_what_other_commands_write(place: Place, whole: Whole, warmed: Warmed, counted: Counted) -> None:
    goes_on(warmed, place, whole)
    for words in (["merge"], ["export", "--to", "gguf", "--merged"], ["export", "--to", "peft"]):
        out = place.root / "out"
        ended = warmed("limited", words=[*words, str(place.run), "--out", str(out)], file_bytes=12_000)
        assert (ended.is_typed, ended.code) == (True, 1), ended.printed
        assert ROOM in ended.printed or "requested and" in ended.printed  # as numpy says it
        assert [path.name for path in place.root.iterdir()] == ["run"]
        counted("size of a full disk")


@pytest.mark.full
@pytest.mark.parametrize("kilobytes", [8, 24, 32, 40, 48, 56, 72, 104, 136, 168, 200, 232])
def test_small_disk(kilobytes: int, place: Place, whole: Whole, warmed: Warmed, counted: Counted) -> None:
    ended = on_disk_of_its_own(warmed, place, kilobytes, "full")
    refused(ended, SPACE, ended.said["first"])
    assert copied(place).outcome() == whole.outcome
    counted("size of a full disk")


@pytest.mark.full
def test_sealed_disk(place: Place, whole: Whole, warmed: Warmed, counted: Counted) -> None:
    ended = on_disk_of_its_own(warmed, place, 4096, "sealed")
    refused(ended, SEALED, ended.said["first"])
    assert copied(place).outcome() == whole.outcome
    counted("place that may not be written")


def on_disk_of_its_own(warmed: Warmed, place: Place, kilobytes: int, then: str) -> Ended:
    disk = place.root / "disk"
    disk.mkdir()
    words = dataclasses.replace(place, root=disk).train
    copy = str(copied(place).root)
    ended = warmed("on_small_disk", words=words, disk=str(disk), kilobytes=kilobytes, then=then, copy=copy)
    assert ended.code == 0, ended.printed
    if not ended.said["granted"]:
        pytest.skip("this system grants no file systems of one's own")
    return ended


def copied(place: Place) -> Place:
    return dataclasses.replace(place, root=place.root.with_name("copied"))


@pytest.mark.parametrize(
    "which", ["checkpoints", *(pytest.param(which, marks=pytest.mark.full) for which in ("parent", "folder"))]
)
def test_folder_that_may_not_be_written(
    which: str, place: Place, whole: Whole, warmed: Warmed, counted: Counted
) -> None:
    """From the start, or since the run began."""
    folder = {"parent": place.root, "folder": place.run, "checkpoints": place.run / "checkpoints"}[which]
    if which != "parent":
        fault = {"what": "kill", "at": whole.of("checkpoint")[-1]}
        assert warmed("watched", words=place.train, place=str(place.root), fault=fault).code < 0
        for checkpoint in (place.run / "checkpoints").iterdir():
            shutil.rmtree(checkpoint)
    folder.chmod(0o555)
    try:
        refused(warmed("without_override", words=place.train), "Permission denied")
    finally:
        folder.chmod(0o755)
    goes_on(warmed, place, whole)
    counted("place that may not be written")


@pytest.mark.full
def test_readers_need_no_right_to_write(place: Place, whole: Whole, warmed: Warmed, counted: Counted) -> None:
    goes_on(warmed, place, whole)
    folders = [place.run, *(Path(path) for path, _, _ in os.walk(place.run))]
    for folder in folders:
        folder.chmod(0o555)
    try:
        for name in ("show", "eval"):
            more = ["--data", str(place.data)] if name == "eval" else []
            assert warmed("without_override", words=[name, str(place.run), *more]).code == 0
        report = warmed("without_override", words=["report", str(place.run)])
        assert (report.is_typed, report.code) == (True, 1)
        assert "Permission denied" in report.printed
        # A finished run is said to be finished, wherever it lies.
        again = warmed("without_override", words=place.train)
        assert again.code == 0, again.printed
        assert "finished already" in again.printed
    finally:
        for folder in folders:
            folder.chmod(0o755)
    counted("place that may not be written")
