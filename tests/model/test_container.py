"""Memory of a container: both versions of Linux' control groups, as files that stand where theirs do."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from loratune.model import available_memory, device, total_memory
from loratune.model.container import Allowance, allowance

GB = 10**9


def group(folder: Path, limit: str, usage: int, cached: int, *, version: int = 2) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


def test_second_version(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    assert allowance(tmp_path, own) is None
    group(tmp_path / "a" / "b", "max", 0, 0)
    assert allowance(tmp_path, own) is None
    group(tmp_path / "a", str(8 * GB), 3 * GB, GB)
    assert allowance(tmp_path, own) == Allowance(8 * GB, 6 * GB)
    group(tmp_path / "a" / "b", str(5 * GB), 5 * GB, 0)
    assert allowance(tmp_path, own) == Allowance(5 * GB, 0)


def test_what_is_given_up_is_no_more_than_is_used(tmp_path: Path) -> None:
    """The two numbers are not read at one moment."""
    own = tmp_path / "own"
    own.write_text("0::/\n")
    group(tmp_path, str(8 * GB), GB, 3 * GB)
    assert allowance(tmp_path, own) == Allowance(8 * GB, 8 * GB)


def test_first_version_seen_from_inside(tmp_path: Path) -> None:
    """The path is the one outside; inside, the group's files are at the root."""
    own = tmp_path / "own"
    own.write_text("12:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n")
    group(tmp_path / "memory", str(4 * GB), GB, 0, version=1)
    group(tmp_path / "cpu,cpuacct", str(GB), GB, 0, version=1)
    assert allowance(tmp_path, own) == Allowance(4 * GB, 3 * GB)


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
def test_unreadable_files_limit_nothing(tmp_path: Path, name: str) -> None:
    own = tmp_path / "own"
    own.write_text("0::/\n")
    group(tmp_path, str(GB), 0, 0)
    assert allowance(tmp_path, own) is not None
    (tmp_path / name).write_text("x y z\n")
    assert allowance(tmp_path, own) is None


def test_other_systems(tmp_path: Path) -> None:
    assert allowance(tmp_path, tmp_path / "none") is None


def test_the_tighter_of_machine_and_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "allowance", lambda: Allowance(2 * GB, GB))
    assert (available_memory(cpu), total_memory(cpu)) == (GB, 2 * GB)
    monkeypatch.setattr(device, "allowance", lambda: Allowance(2**62, 2**62))
    assert total_memory(cpu) == psutil.virtual_memory().total
    assert available_memory(cpu) <= psutil.virtual_memory().total
