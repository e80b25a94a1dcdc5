"""The blocks in C, compiled for this processor when they are first wanted, and kept for all runs after that."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from loratune.files import cache_folder

SOURCE = Path(__file__).with_name("c_blocks.c")
# Contracted products and sums are rounded once instead of twice; no sum is reordered but where it says so itself.
_FLAGS = (
    "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC",
    "-shared",
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
)  # fmt: skip
_SECONDS = 120


def library() -> ctypes.CDLL:
    """The compiled blocks.

    Raises:
        OSError: they cannot be had here; with the reason.
    """
    if not sys.platform.startswith("linux"):
        # Elsewhere the compiler's threads would not be torch's own, and two teams of them wait for each other.
        raise OSError(f"they are compiled on Linux alone, not on {sys.platform}")
    folder = cache_folder() / "kernels"
    for kept in _kept(folder):
        with suppress(OSError):  # of another system that shares this home: made anew
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory(prefix="loratune-") as place:
        made = Path(place, "blocks.so")
        _compile(made)
        found = ctypes.CDLL(str(made))  # what cannot be loaded is not kept
        with suppress(OSError):  # no room, or a home that may not be written: compiled again the next time
            _keep(made, folder / f"{_name(_compiler())}-{made.stat().st_size}.so")
    return found


def _kept(folder: Path) -> list[Path]:
    """Files for this machine and compiler, whole ones: of those that are cut off the system would find no end.

    Without a compiler any one's will do.
    """
    compiler = _compiler()
    pattern = f"{_name(compiler) if compiler else f'blocks-{_key()}-*'}-*.so"
    found = [(path, path.stem.rpartition("-")[2]) for path in sorted(folder.glob(pattern))]
    return [path for path, size in found if size == str(path.stat().st_size)]


def _name(compiler: str) -> str:
    """A newer compiler may know more of the processor."""
    return f"blocks-{_key()}-{_digest(compiler)}"


def _key() -> str:
    """Of all that the compiled file depends on: a home may be shared by machines."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.c"))]
    return _digest("\n".join([*sources, *_FLAGS, _processor()]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _processor() -> str:
    """What the processor can do, in the kernel's words."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([os.uname().machine, *sorted({line for line in lines if line.startswith(wanted)})])


def _asked_for() -> str:
    return os.environ.get("CC") or "cc"


def _compiler() -> str:
    """Which compiler it is, in words; none where there is none."""
    words = shlex.split(_asked_for())
    found = shutil.which(words[0])
    if found is None:
        return ""
    path = Path(found).resolve()
    return " ".join([str(path), *words[1:], str(path.stat().st_size), str(path.stat().st_mtime_ns)])


def _compile(target: Path) -> None:
    compiler = _asked_for()
    words = shlex.split(compiler)
    if shutil.which(words[0]) is None:
        raise OSError(f"there is no C compiler ({compiler})")
    command = [*words, *_FLAGS, str(SOURCE), "-o", str(target), "-lm"]
    try:
        done = subprocess.run(  # noqa: S603 - the user's own compiler
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"the C compiler ({compiler}) did not end within {_SECONDS} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["without a word"]
        raise OSError(f"the C compiler ({compiler}) failed: {said[0]}")


def _keep(made: Path, kept: Path) -> None:
    """In one step: processes that train together all come here at once."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=kept.parent)
    os.close(number)
    beside = Path(name)
    try:
        shutil.copyfile(made, beside)
        beside.replace(kept)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
