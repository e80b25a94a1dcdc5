"""Model folders with something wrong in them: made from a sound one, which is changed in one place."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from tests.malformed.cases import Case, changed

CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
KEY = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[Path], object]


def cases() -> Iterator[Case]:
    """Each changes the sound model that stands in the folder `model`."""
    yield from _configs()
    yield from _weights()
    yield from _tokenizers()
    yield from _code()


def case(name: str, change: Change, *named: str) -> Case:
    return changed(name, "model", change, *named)


def content(name: str, text: str | bytes) -> Change:
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def json_of(name: str, change: Callable[[Any], Any]) -> Change:
    def act(folder: Path) -> None:
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return act


_NO_JSON = {
    "empty": "", "null": "null", "a list": "[]", "a text": '"a"', "cut off": '{"model_type": "lla',
    "latin-1": '{"a": "schön"}'.encode("latin-1"), "zeros": b"\x00" * 64, "very deep": "[" * 100_000,
}  # fmt: skip


def _configs() -> Iterator[Case]:
    for what, text in _NO_JSON.items():
        yield case(f"config: {what}", content(CONFIG, text))
    yield case("no config", lambda folder: (folder / CONFIG).unlink())
    yield case("a folder for config", lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()))
    for key, values in {
        "model_type": ["nothing", 3, None, "../llama", "bert"],
        "hidden_size": [0, -32, "32", None, 33, 32.5],
        "num_hidden_layers": [3, "2", None],
        "num_attention_heads": [0, 3, -4, "4"],
        "num_key_value_heads": [3, 0],
        "vocab_size": [0, -1, 399, "400"],
        "intermediate_size": [65, "64"],
        "max_position_embeddings": [-5, 0, "128", None],
        "hidden_act": ["nothing", 3],
        "rope_parameters": [3, {"rope_type": "nothing"}, []],
        "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    }.items():
        for value in values:
            yield case(f"config: {key} = {value}", json_of(CONFIG, lambda held, k=key, v=value: {**held, k: v}))  # type: ignore[misc]


def _weights() -> Iterator[Case]:
    def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
        def act(folder: Path) -> None:
            held = load((folder / TENSORS).read_bytes())
            change(held)
            save_file({key: t.contiguous() for key, t in held.items()}, folder / TENSORS, metadata={"format": "pt"})

        return act

    def to(act: Callable[[torch.Tensor], torch.Tensor]) -> Change:
        return tensors(lambda held: held.update({KEY: act(held[KEY])}))

    def cut(at: Callable[[int], int]) -> Change:
        def act(folder: Path) -> None:
            raw = (folder / TENSORS).read_bytes()
            (folder / TENSORS).write_bytes(raw[: at(len(raw))])

        return act

    def sharded(index: Any) -> Change:
        def act(folder: Path) -> None:
            (folder / TENSORS).rename(folder / "model-00001-of-00002.safetensors")
            (folder / f"{TENSORS}.index.json").write_text(index if isinstance(index, str) else json.dumps(index))

        return act

    yield case("no weights", lambda folder: (folder / TENSORS).unlink())
    for name, at in {"at 0": 0, "at 4": 4, "at 9": 9}.items():
        yield case(f"weights cut off {name}", cut(lambda _, at=at: at))  # type: ignore[misc]
    yield case("weights cut off in the middle", cut(lambda size: size // 2))
    yield case("weights cut off by a byte", cut(lambda size: size - 1))
    yield case("weights: noise", content(TENSORS, bytes(range(256)) * 40))
    yield case("weights: text", content(TENSORS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"))
    yield case("no tensors", tensors(lambda held: held.clear()))
    yield case("one missing", tensors(lambda held: held.pop(KEY)), KEY)
    yield case("NaN", to(lambda t: t * float("nan")), KEY)
    yield case("infinity", to(lambda t: t / 0), KEY)
    yield case("transposed", to(lambda t: t.T), KEY)
    yield case("one row less", to(lambda t: t[:-1]), KEY)
    yield case("flat", to(lambda t: t.flatten()), KEY)
    yield case("an index of nothing", sharded("{}"))
    yield case("an index that is no JSON", sharded("{"))
    yield case(
        "an index of a part that is not there", sharded({"weight_map": {KEY: "model-00002-of-00002.safetensors"}})
    )
    yield case("an index that leads out", sharded({"weight_map": {KEY: "../../../etc/passwd"}}))


def _tokenizers() -> Iterator[Case]:
    for what, text in _NO_JSON.items():
        yield case(f"tokenizer: {what}", content(TOKENIZER, text))
    yield case(
        "no tokenizer", lambda folder: [(folder / name).unlink() for name in (TOKENIZER, "tokenizer_config.json")]
    )
    yield case("tokenizer of nothing", content(TOKENIZER, '{"model": {"type": "Nothing"}}'))
    for what, text in {
        "that never ends": "{% for x in messages %}", "with a wrong name": "{{ nothing(messages) }}",
        "of an unknown tag": "{% nothing %}", "that refuses": "{{ raise_exception('no') }}",
        "that looks around": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "that says nothing": "",
        "that leaves answers out": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
        "that turns answers round": "{% for m in messages %}{{ m['content'][::-1] }}{% endfor %}",
        "that cuts answers": "{% for m in messages %}{{ m['content'][:1] }}{% endfor %}",
    }.items():  # fmt: skip
        yield case(f"a template {what}", content("chat_template.jinja", text))


class Runs:
    """What a pickle may do when it is read."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.file),)


def _code() -> Iterator[Case]:
    def pickled(folder: Path) -> None:
        (folder / TENSORS).unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(str(folder.parent / "ran"))))

    def remote(folder: Path) -> None:
        (folder / "modeling_own.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")
        own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
        json_of(CONFIG, lambda held: {**held, "model_type": "own", "auto_map": own})(folder)

    yield case("a pickle that runs code", pickled)
    yield case("a model that brings code", remote)
