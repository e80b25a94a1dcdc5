"""Damage to `adapter_model.safetensors`: its tensors one by one, and its header."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.adapter.mutations import (
    EITHER,
    HUGE,
    PREFIX,
    Q0,
    Q0A,
    Q0B,
    REFUSED,
    V1A,
    V1B,
    Change,
    Found,
    Mutation,
    in_header,
    in_tensors,
    join,
    parts,
    shown,
)

# -- the tensors -------------------------------------------------------------------------------------------------------


def tensors() -> Found:
    """Single tensors renamed, removed, added, of another shape, another type, or not finite."""
    for key in (Q0A, Q0B, V1A, V1B):
        short = key.removeprefix(PREFIX).removesuffix(".weight")
        for what, change in _changed_tensors(key):
            yield Mutation(f"tensor/{short} {what}", REFUSED, in_tensors(change))
    yield Mutation("tensor/none at all", REFUSED, in_tensors(dict.clear))
    yield Mutation("tensor/a module's both", REFUSED, in_tensors(lambda t: (t.pop(Q0A), t.pop(Q0B))))
    yield Mutation("tensor/A and B swapped", REFUSED, in_tensors(_exchange(Q0A, Q0B)))
    yield Mutation("tensor/two modules swapped", REFUSED, in_tensors(_exchange(Q0B, V1B)))
    yield Mutation("tensor/all zero", EITHER, in_tensors(lambda t: [x.zero_() for x in t.values()]))
    kinds = [(EITHER, "float64 float16 bfloat16 float8_e4m3fn float8_e5m2")]
    kinds += [(REFUSED, "int8 int32 int64 uint8 bool complex64")]
    for expect, names in kinds:
        for name in names.split():
            yield Mutation(f"tensor/all as {name}", expect, in_tensors(_cast(getattr(torch, name))))
            yield Mutation(f"tensor/one as {name}", expect, in_tensors(_cast(getattr(torch, name), V1B)))
    for name in _other_names():
        yield Mutation(f"name/{shown(ascii(name))} instead", REFUSED, in_tensors(_named(name, keep=False)))
        yield Mutation(f"name/{shown(ascii(name))} added", REFUSED, in_tensors(_named(name, keep=True)))


def _changed_tensors(key: str) -> Iterator[tuple[str, Callable[[dict[str, Tensor]], object]]]:
    yield "removed", lambda t: t.pop(key)
    yield "transposed", lambda t: t.update({key: t[key].T.contiguous()})
    yield "one row more", lambda t: t.update({key: torch.cat([t[key], t[key][:1]])})
    yield "one column less", lambda t: t.update({key: t[key][:, 1:].contiguous()})
    yield "flat", lambda t: t.update({key: t[key].flatten()})
    yield "of three axes", lambda t: t.update({key: t[key][None].clone()})
    yield "a scalar", lambda t: t.update({key: t[key][0, 0].clone()})
    yield "without rows", lambda t: t.update({key: t[key][:0].clone()})
    yield "without columns", lambda t: t.update({key: t[key][:, :0].clone()})
    yield "holds NaN", lambda t: t[key].view(-1)[-1].fill_(math.nan)
    yield "holds infinity", lambda t: t[key].view(-1)[0].fill_(-math.inf)


def _exchange(first: str, second: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({first: t[second], second: t[first]})


def _cast(dtype: torch.dtype, *keys: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({key: t[key].to(dtype) for key in keys or list(t)})


def _named(name: str, *, keep: bool) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({name: t[Q0A].clone() if keep else t.pop(Q0A)})


_PATHS = (
    *("model.norm", "model.layers.0", "lm_head", "model.layers.00.self_attn.q_proj", "model.layers.9.mlp.up_proj"),
    *("", ".", "..", "../../../etc/passwd", "a\0b", "ｍodel.layers.0.self_attn.q_proj", "модель", "🙂", "__class__"),
    *("model.layers.-1.self_attn.q_proj", "model.layers.0.self_attn.q_proj ", "x" * 50_000, "lora_state", "%s{0}"),
)
_SUFFIXES = (
    *("lora_A", "lora_A.default.weight", "lora_a.weight", "LORA_A.WEIGHT", "lora_A.weight.weight", "lora_A.bias"),
    *("lora_B.bias", "lora_embedding_A", "lora_magnitude_vector", "weight"),
)


def _other_names() -> list[str]:
    names = ["", "lora_A.weight", f"{Q0.removeprefix(PREFIX)}.lora_A.weight", f"{PREFIX}{Q0}.lora_A.weight"]
    names += [f"{PREFIX}{path}.lora_A.weight" for path in _PATHS]
    return names + [f"{Q0}.{suffix}" for suffix in _SUFFIXES]


# -- the header --------------------------------------------------------------------------------------------------------


def headers() -> Found:
    for length in (0, 1, 2, 100_000_001, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1):
        yield Mutation(f"header/length {length}", REFUSED, _said_length(length))
    for what, header in _other_headers():
        yield Mutation(f"header/{what}", REFUSED, _with_header(header))
    for field, values in _ENTRY.items():
        yield Mutation(f"header/without {field}", REFUSED, in_header(_entry(field)))
        for value in values:
            yield Mutation(f"header/{field}={shown(ascii(value))}", REFUSED, in_header(_entry(field, value)))
    yield Mutation("header/two tensors in one place", REFUSED, in_header(_overlapping))
    yield Mutation("header/an unknown field", EITHER, in_header(lambda h: h[Q0A].update(x=1)))
    for meta in _METADATA:
        yield Mutation(f"header/metadata {shown(ascii(meta))}", EITHER, in_header(_metadata(meta)))
    yield Mutation("header/a name twice", REFUSED, lambda f: _doubled(f, same=False))
    yield Mutation("header/an entry twice", EITHER, lambda f: _doubled(f, same=True))
    yield Mutation("header/spaces after it", EITHER, lambda f: join(f, parts(f)[0] + b" " * 64, parts(f)[1]))


_ENTRY: dict[str, list[Any]] = {
    "dtype": ["F64", "F16", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "f32", "", "X", 5, None, []],
    "shape": [
        *([], [0], [0, 32], [-4, 32], [4], [4, 31], [4, 33], [128], [32, 4], [4, 32, 1], [2**63, 2], [2**40, 2**40]),
        *(["4", "32"], [4.5, 32], "4,32", None, 128, {}, [HUGE, 32], [1] * 3000),
    ],
    "data_offsets": [[0, 0], [0], [], [512, 0], [-512, 0], [1, 513], [0, 2**63], [2**64, 0], [0, 511], None, "0,512"],
}


_METADATA: tuple[Any, ...] = (None, {}, {"format": "tf"}, {"x": "y"}, {"format": 1}, [], "pt", {"x": "y" * 10_000})


def _said_length(length: int) -> Change:
    return lambda folder: join(folder, *parts(folder), length=length)


def _with_header(header: bytes) -> Change:
    return lambda folder: join(folder, header, parts(folder)[1])


def _entry(field: str, *value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[Q0A].update({field: value[0]}) if value else header[Q0A].pop(field)


def _overlapping(header: dict[str, Any]) -> None:
    header[Q0A]["data_offsets"] = header[Q0A.replace("layers.0", "layers.1")]["data_offsets"]


def _metadata(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.update(__metadata__=value)


def _other_headers() -> list[tuple[str, bytes]]:
    return [
        ("empty", b""),
        ("{}", b"{}"),
        ("[]", b"[]"),
        ("null", b"null"),
        ("not JSON", b"{" + b"x" * 200),
        ("not UTF-8", b'{"\xff\xfe": 1}'),
        ("UTF-16", "{}".encode("utf-16")),
        ("100,000 brackets", b"[" * 100_000),
        ("100,000 nested objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        ("entries that are lists", json.dumps({Q0A: []}).encode()),
        ("entries that are null", json.dumps({Q0A: None}).encode()),
    ]


def _doubled(folder: Path, *, same: bool) -> None:
    """The same name a second time: with the same entry, or with that of another tensor of its shape."""
    header, data = parts(folder)
    entries = json.loads(header)
    other = entries[Q0A] if same else entries[Q0A.replace("layers.0", "layers.1")]
    join(folder, header.rstrip()[:-1] + f",{json.dumps(Q0A)}:{json.dumps(other)}}}".encode(), data)
