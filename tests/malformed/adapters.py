"""Adapter folders with something wrong in them: made from a sound one, which is changed in one place."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from tests.malformed.cases import Case, changed

CONFIG, TENSORS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "loratune.json"
KEY = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
Change = Callable[[Path], object]

_WRONG: dict[str, list[Any]] = {
    "r": [0, -1, 2.5, "4", None, True, [4], 10**12, 5],
    "lora_alpha": ["8", None, [8], float("nan"), float("inf"), {"a": 1}],
    "lora_dropout": [-0.1, 1.5, "0.1", None, float("nan")],
    "target_modules": [3, {}, [3], [], ["nowhere"], "(", "nowhere", [["q_proj"]]],
    "exclude_modules": [3, {"a": 1}, [[]], "("],
    "modules_to_save": [3, "nowhere", ["nowhere"], [3], {"a": 1}],
    "bias": ["some", 3, None, True],
    "use_rslora": ["yes", 3, None],
    "use_dora": ["yes", 3, True],
    "init_lora_weights": [3, "pissa_niter_4", "nowhere", []],
    "rank_pattern": [3, [4], {"q_proj": "4"}, {"q_proj": -4}, {"q_proj": 7}, {"(": 4}],
    "alpha_pattern": [3, {"q_proj": None}, {"q_proj": "8"}],
    "layers_to_transform": ["1", [-1], [99], {"a": 1}],
    "peft_type": ["IA3", "lora ", 3, None, "LORA_GA"],
    "task_type": ["NOTHING", 3],
    "fan_in_fan_out": ["x"],
    "base_model_name_or_path": [3, ["a"], {"a": 1}],
    "target_parameters": [["experts.gate_up_proj"], 3],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}, "x"],
    "layer_replication": [[[0, 2]]],
    "megatron_config": [{"a": 1}],
    "lora_bias": ["x", 3],
}


def cases() -> Iterator[Case]:
    """Each changes the sound adapter that stands in the folder `adapter`."""
    yield from _configs()
    yield from _json_files()
    yield from _safetensors()
    yield from _tensors()
    yield from _places()


def case(name: str, change: Change, *named: str) -> Case:
    return changed(name, "adapter", change, *named)


def _configs() -> Iterator[Case]:
    for key, values in _WRONG.items():
        for value in values:
            yield case(f"{key} = {str(value)[:30]}", _set(key, value))
    for key in ("peft_type", "target_modules", "r"):
        yield case(f"no {key}", _set(key))


def _set(*pair: Any) -> Change:
    """With a value the key has it, without one it is taken out."""

    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config.pop(pair[0], None)
        if len(pair) == 2:
            config[pair[0]] = pair[1]
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def _content(name: str, content: str | bytes) -> Change:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def _json_files() -> Iterator[Case]:
    for name in (CONFIG, ORIGIN):
        for what, content in {
            "empty": "", "blank": " ", "null": "null", "a list": "[]", "a text": '"r"', "a number": "3",
            "cut off": '{"r": 4, "lora', "two documents": "{}{}", "latin-1": '{"a": "schön"}'.encode("latin-1"),
            "utf-16": "{}".encode("utf-16"), "zeros": b"\x00" * 64, "very deep": "[" * 100_000,
            "the same key twice": '{"r": 4, "r": 8}',
        }.items():  # fmt: skip
            if (name, what) != (ORIGIN, "the same key twice"):
                yield case(f"{name}: {what}", _content(name, content))
    for key, value in {"base": 3, "tokenizer": [], "base_fingerprint": "x" * 10_000}.items():
        yield case(f"{ORIGIN}: {key}", _content(ORIGIN, json.dumps({key: value, "base_sha256": "0" * 64})))


def _safetensors() -> Iterator[Case]:
    def bytes_(change: Callable[[bytes, int], bytes]) -> Change:
        """Of the file's bytes and the length of its header."""

        def act(folder: Path) -> None:
            raw = (folder / TENSORS).read_bytes()
            (folder / TENSORS).write_bytes(change(raw, *struct.unpack("<Q", raw[:8])))

        return act

    def header(change: Callable[[dict[str, Any]], Any]) -> Change:
        return bytes_(lambda raw, size: _with_header(change(json.loads(raw[8 : 8 + size])), raw[8 + size :]))

    for cut in (0, 4, 8, 9):
        yield case(f"cut off at {cut}", bytes_(lambda raw, _, cut=cut: raw[:cut]), TENSORS)  # type: ignore[misc]
    yield case("cut off in its header", bytes_(lambda raw, size: raw[: 8 + size // 2]), TENSORS)
    yield case("cut off behind its header", bytes_(lambda raw, size: raw[: 8 + size]), TENSORS)
    yield case("cut off in its first number", bytes_(lambda raw, size: raw[: 9 + size]), TENSORS)
    yield case("cut off by a number", bytes_(lambda raw, _: raw[:-4]), TENSORS)
    yield case("cut off by a byte", bytes_(lambda raw, _: raw[:-1]), TENSORS)
    yield case("something behind it", bytes_(lambda raw, _: raw + b"\x00"), TENSORS)
    yield case("noise", _content(TENSORS, bytes(range(256)) * 40), TENSORS)
    yield case("a pickle", lambda folder: torch.save({"r": torch.ones(1)}, folder / TENSORS), TENSORS)
    for length in (0, 2**40, 2**64 - 1):
        yield case(f"a header of {length}", bytes_(lambda raw, _, n=length: struct.pack("<Q", n) + raw[8:]), TENSORS)  # type: ignore[misc]
    yield case("a header a byte short", bytes_(lambda raw, size: struct.pack("<Q", size - 1) + raw[8:]), TENSORS)
    for what, change in {
        "offsets beyond the end": {"data_offsets": [0, 10**9]},
        "offsets backwards": {"data_offsets": [64, 0]},
        "offsets below zero": {"data_offsets": [-8, 0]},
        "a shape that is too large": {"shape": [2**40, 2**40]},
        "a shape below zero": {"shape": [-1, 4]},
        "an unknown dtype": {"dtype": "F13"},
        "no dtype": {"dtype": None},
    }.items():
        yield case(what, header(lambda held, change=change: {**held, KEY: {**held[KEY], **change}}), TENSORS)  # type: ignore[misc]
    yield case("a header that is a list", header(lambda _: [1, 2]), TENSORS)


def _with_header(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _tensors() -> Iterator[Case]:
    def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
        def act(folder: Path) -> None:
            held = load((folder / TENSORS).read_bytes())  # not mapped: the file is written again
            change(held)
            save_file({key: t.contiguous() for key, t in held.items()}, folder / TENSORS, metadata={"format": "pt"})

        return act

    def to(act: Callable[[torch.Tensor], torch.Tensor]) -> Change:
        return tensors(lambda held: held.update({KEY: act(held[KEY])}))

    def renamed(name: str) -> Change:
        return tensors(lambda held: held.update({name: held.pop(KEY)}))

    yield case("no tensors", tensors(lambda held: held.clear()))
    yield case("one missing", tensors(lambda held: held.pop(KEY)), "down_proj")
    yield case("one more", tensors(lambda held: held.update({KEY.replace("1", "9"): held[KEY].clone()})), "layers.9")
    yield case("NaN", to(lambda t: t * float("nan")), KEY)
    yield case("infinity", to(lambda t: t / 0), KEY)
    yield case("transposed", to(lambda t: t.T), "down_proj")
    yield case("flat", to(lambda t: t.flatten()), "down_proj")
    yield case("of three dimensions", to(lambda t: t[None]), "down_proj")
    yield case("a number", to(lambda t: t[0, 0]), "down_proj")
    yield case("no columns", to(lambda t: t[:, :0]), "down_proj")
    yield case("no rows", to(lambda t: t[:0]), "down_proj")
    yield case("one row less", to(lambda t: t[:-1]), "down_proj")
    yield case("one column more", to(lambda t: torch.cat([t, t[:, :1]], 1)), "down_proj")
    for dtype in (torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn):
        yield case(f"of {dtype}", to(lambda t, dtype=dtype: t.to(dtype)), "down_proj")  # type: ignore[misc]
    odd = ("../../../etc/passwd", "", "lora_A.weight", "base_model.model.lora_A.weight", KEY + ".x", "a" * 5000)
    for name in (*odd, *(KEY.replace(*pair) for pair in (("_A", "_C"), ("base_model.model.", ""), ("down", "dówn")))):
        yield case(f"a tensor called {name[:40]!r}", renamed(name))


def _places() -> Iterator[Case]:
    def no(name: str) -> Change:
        return lambda folder: (folder / name).unlink()

    def folder_for(name: str) -> Change:
        return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())

    def link_to(name: str, target: str) -> Change:
        return lambda folder: ((folder / name).unlink(), (folder / name).symlink_to(target))

    for name in (CONFIG, TENSORS):
        yield case(f"no {name}", no(name))
        yield case(f"a folder for {name}", folder_for(name))
        yield case(f"a link to itself for {name}", link_to(name, name))
        yield case(f"a link to nothing for {name}", link_to(name, "../../gone"))
        yield case(f"a link to the null device for {name}", link_to(name, "/dev/null"))
    yield case("an empty folder", lambda folder: [path.unlink() for path in folder.iterdir()])
    yield case("only pickled tensors", lambda folder: (folder / TENSORS).rename(folder / "adapter_model.bin"))
