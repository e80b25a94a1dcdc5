"""Damage to an adapter's folder: every way we know in which its files can be wrong, each with a readable name.

Here the files as wholes; `tensor_mutations.py` and `config_mutations.py` go inside them. The list is fixed: what is
drawn comes from generators with fixed seeds. Each mutation says what must come of `attach`:

REFUSED   nothing but an error
SAME      success with the good adapter's outputs, bit for bit
EITHER    an error, or a success whose outputs an independent reading of the damaged files gives too. A flipped bit in
          a tensor is the plainest case: what it makes is another valid adapter. The two highest bits of an exponent are
          left alone: they turn 0.3 into 1e38, which is finite, but whose outputs nobody can compare.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
REFUSED, SAME, EITHER = "refused", "same", "either"
MARKER = "opened"  # what a pickle makes in the folder when it is opened
OUTSIDE = "outside"  # a folder beside the adapter's, from which nothing may be taken

PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
V1 = f"{PREFIX}model.layers.1.self_attn.v_proj"
Q0A, Q0B, V1A, V1B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight", f"{V1}.lora_A.weight", f"{V1}.lora_B.weight"

HUGE = 10**400  # JSON has no bound for numbers; no float holds this one


Change = Callable[[Path], object]


@dataclass(frozen=True)
class Mutation:
    """`id` is kind/what; `judge` is who computes what a success must give: `plain` (W + s · B A) or `peft`."""

    id: str
    expect: str
    change: Change
    judge: str = "plain"

    @property
    def kind(self) -> str:
        return self.id.split("/")[0]


Found = Iterator[Mutation]


# -- what changes files ------------------------------------------------------------------------------------------------


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(config)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = parts(folder)
    entries = json.loads(header)
    change(entries)
    join(folder, json.dumps(entries).encode(), data)


def parts(folder: Path) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file: 8 bytes of length (little endian), so many bytes of JSON, the data."""
    content = (folder / TENSORS).read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def join(folder: Path, header: bytes, data: bytes, *, length: int | None = None) -> None:
    said = len(header) if length is None else length
    (folder / TENSORS).write_bytes(struct.pack("<Q", said) + header + data)


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


# What follows returns a change, so that a loop's variable is taken at its value of that moment.


def put(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def cut(name: str, end: int) -> Change:
    return rewrite(name, lambda content: content[:end])


def cut_share(name: str, share: float) -> Change:
    return rewrite(name, lambda content: content[: int(share * len(content))])


def in_tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    return lambda folder: edit_tensors(folder, change)


def in_header(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder: edit_header(folder, change)


def at(name: str, change: Callable[[Path, str], object]) -> Change:
    return lambda folder: change(folder, name)


class Trap:
    """Opened as a pickle it makes a folder that the test looks for."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def shown(text: str) -> str:
    """Short enough for a test's name, and still told apart."""
    return text if len(text) < 80 else f"{text[:40]}... {len(text)} characters"


# -- the files as wholes -----------------------------------------------------------------------------------------------


def truncations() -> Found:
    for end in (0, 1, 7, 8, 9, 40, -1, -3, -4, -64, -1000):
        yield Mutation(f"truncated/tensors to {end} bytes", REFUSED, cut(TENSORS, end))
    for tenth in range(1, 10):
        yield Mutation(f"truncated/tensors to {tenth} tenths", REFUSED, cut_share(TENSORS, tenth / 10))
        yield Mutation(f"truncated/config to {tenth} tenths", REFUSED, cut_share(CONFIG, tenth / 10))
    for end in (0, 1, 2):
        yield Mutation(f"truncated/config to {end} bytes", REFUSED, cut(CONFIG, end))
    yield Mutation("truncated/config by its last bracket", REFUSED, rewrite(CONFIG, lambda b: b.rstrip()[:-1]))
    yield Mutation("truncated/config by its last newline", SAME, rewrite(CONFIG, bytes.rstrip))
    for tenth in range(0, 10, 2):
        yield Mutation(f"truncated/card to {tenth} tenths", SAME, cut_share(CARD, tenth / 10))
    yield Mutation("longer/tensors by a zero", REFUSED, rewrite(TENSORS, lambda b: b + b"\0"))
    yield Mutation("longer/tensors by a page", REFUSED, rewrite(TENSORS, lambda b: b + b"\0" * 4096))
    yield Mutation("longer/config by zeros", REFUSED, rewrite(CONFIG, lambda b: b + b"\0\0"))
    yield Mutation("longer/config by spaces", SAME, rewrite(CONFIG, lambda b: b + b" \r\n\t "))
    yield Mutation("longer/config twice", REFUSED, rewrite(CONFIG, lambda b: b + b))


def flips() -> Found:
    for where, count in (("header", 40), ("config", 60), ("data", 24), ("length", 8)):
        dice = random.Random(f"flips of {where}")
        for _ in range(count):
            share, bit = dice.random(), dice.randrange(8)

            def change(folder: Path, where: str = where, share: float = share, bit: int = bit) -> None:
                header, data = parts(folder)
                if where == "config":
                    flip(folder / CONFIG, int(share * (folder / CONFIG).stat().st_size), bit)
                elif where == "length":
                    flip(folder / TENSORS, int(share * 8), bit)
                elif where == "header":
                    flip(folder / TENSORS, 8 + int(share * len(header)), bit)
                else:
                    at = int(share * len(data))
                    flip(folder / TENSORS, 8 + len(header) + at, bit if at % 4 != 3 or bit == 7 else bit % 6)

            yield Mutation(f"flip/{where} at {share:.4f} bit {bit}", REFUSED if where == "length" else EITHER, change)


def strangers() -> Found:
    """Files of other kinds under the names, and folders, links and pickles in their places."""
    for name in (TENSORS, CONFIG):
        yield Mutation(f"stranger/{name} is gone", REFUSED, at(name, _gone))
        yield Mutation(f"stranger/{name} is empty", REFUSED, put(name, b""))
        yield Mutation(f"stranger/{name} is zeros", REFUSED, put(name, b"\0" * 4096))
        yield Mutation(f"stranger/{name} is noise", REFUSED, put(name, random.Random(7).randbytes(4096)))
        yield Mutation(f"stranger/{name} is a pickle", REFUSED, at(name, _pickle))
        yield Mutation(f"stranger/{name} is torch's pickle", REFUSED, at(name, _torch_pickle))
        yield Mutation(f"stranger/{name} is a zip", REFUSED, at(name, _zip))
        yield Mutation(f"stranger/{name} is a folder", REFUSED, at(name, _folder))
        yield Mutation(f"stranger/{name} is a pipe", REFUSED, at(name, _pipe))
        for target in ("nowhere", name, "/dev/null", "."):
            yield Mutation(f"stranger/{name} links to {target}", REFUSED, _link(name, target))
        yield Mutation(f"stranger/{name} links to itself elsewhere", SAME, at(name, _moved))
        if os.geteuid() != 0:  # root reads everything
            yield Mutation(f"stranger/{name} may not be read", REFUSED, at(name, lambda f, n: (f / n).chmod(0)))
    yield Mutation("stranger/both swapped", REFUSED, _swapped)
    yield Mutation("stranger/only adapter_model.bin", REFUSED, _only_bin)
    yield Mutation("stranger/a pickle beside", SAME, at("adapter_model.bin", _pickle))
    yield Mutation("stranger/the folder is gone", REFUSED, shutil.rmtree)
    yield Mutation("stranger/the folder is empty", REFUSED, _emptied)
    yield Mutation("stranger/the folder is a file", REFUSED, _folder_as_file)
    yield Mutation("stranger/the folder links to itself", REFUSED, _folder_as_link)
    yield Mutation("card/is gone", SAME, at(CARD, _gone))
    yield Mutation("card/is noise", SAME, put(CARD, random.Random(8).randbytes(999)))
    yield Mutation("card/is a folder", SAME, at(CARD, _folder))
    yield Mutation("card/links to itself", SAME, _link(CARD, CARD))
    for name in ("training_args.bin", "tokenizer.json", "adapter_config.json.bak", "a\udcff"):
        yield Mutation(f"card/noise in {name!a}", SAME, put(name, b"\x80noise"))
    yield Mutation("kill/an unfinished write", SAME, lambda f: _beside(f, ".staged", CONFIG))
    yield Mutation("kill/.staged is a file", SAME, put(".staged", b"x"))
    yield Mutation("kill/.committed is a file", SAME, put(".committed", b"x"))
    yield Mutation("kill/.committed holds noise", REFUSED, lambda f: _beside(f, ".committed", CONFIG))
    yield Mutation("kill/.committed holds a folder", EITHER, lambda f: (f / ".committed" / CONFIG).mkdir(parents=True))
    yield Mutation("kill/.committed links to the folder", EITHER, lambda f: (f / ".committed").symlink_to(f))
    yield Mutation("kill/.committed links outside", EITHER, _link_outside)
    yield Mutation("kill/.staged links outside", SAME, lambda f: _link_outside(f, ".staged"))


def _gone(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _pickle(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Trap(folder / MARKER)))


def _torch_pickle(folder: Path, name: str) -> None:
    torch.save(Trap(folder / MARKER), folder / name)


def _only_bin(folder: Path) -> None:
    (folder / TENSORS).unlink()
    _torch_pickle(folder, "adapter_model.bin")


def _zip(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr(name, content)


def _folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def _pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def _link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def _emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _folder_as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


def _folder_as_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def _moved(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "elsewhere")
    (folder / name).symlink_to("elsewhere")


def _swapped(folder: Path) -> None:
    tensors, config = (folder / TENSORS).read_bytes(), (folder / CONFIG).read_bytes()
    (folder / TENSORS).write_bytes(config)
    (folder / CONFIG).write_bytes(tensors)


def _link_outside(folder: Path, name: str = ".committed") -> None:
    outside = folder.parent / OUTSIDE
    outside.mkdir()
    (outside / "kept").write_bytes(b"x")
    (folder / name).symlink_to(outside)


def _beside(folder: Path, place: str, name: str) -> None:
    (folder / place).mkdir()
    (folder / place / name).write_bytes(b"\x80noise")
