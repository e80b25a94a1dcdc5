"""Products of ever new shapes: what is kept of them stays bounded."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from loratune.model.kept_products import keep_few_products

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

# MB that glibc holds more after 300 products of new shapes, behind as many others. In a process of its own, for the
# caches read their bounds once.
GROWTH = """
import ctypes, sys, torch

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used f g".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
if sys.argv[1] == "bounded":
    from loratune.model import base_of
    from loratune.model.tiny import tiny_model

    base_of(*tiny_model())
weight = torch.ones(576, 1536, dtype=torch.bfloat16)
used = []
for rows in range(100, 700):
    torch.ones(rows, 576, dtype=torch.bfloat16) @ weight
    used.append(libc.mallinfo2().used)
print((used[-1] - used[299]) / 2**20)
"""


def grown(how: str) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in CACHES}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, how], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_base_bounds_what_is_kept() -> None:
    stock = grown("stock")
    if stock < 20:
        pytest.skip("this processor's bf16 products are not compiled for each shape")
    assert grown("bounded") < 0.1 * stock


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.delenv(CACHES[1], raising=False)
    keep_few_products()
    assert os.environ[CACHES[0]] == "7"
    assert int(os.environ[CACHES[1]]) < 1024
