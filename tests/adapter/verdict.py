"""What may come of `attach(model, folder)`, whatever the folder holds; a breach is an AssertionError.

Two readings of an adapter's files that share no code with ours say what an accepted one must compute.
"""

from __future__ import annotations

import copy
import json
import re
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from loratune.errors import AdapterStateError, LoratuneError
from tests.adapter.mutations import CONFIG, MARKER, OUTSIDE, PREFIX, REFUSED, SAME, TENSORS, Mutation
from tests.models import VOCABULARY, tiny

SECONDS = 30.0
SETTINGS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 5},
}
IDS = torch.arange(2 * 7).view(2, 7) * 17 % VOCABULARY
Attach = Callable[[nn.Module, Path], lt.Adapters]


# -- what is compared --------------------------------------------------------------------------------------------------


@cache
def _base() -> Any:
    return tiny("llama")


def base() -> Any:
    return copy.deepcopy(_base())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, Tensor)
    return found


def gap(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def photograph(model: nn.Module) -> dict[str, Any]:
    """All that a refused load must leave as it was; bytes, since NaN differs from itself and -0 equals 0."""
    state = {name: (t.dtype, t.shape, bits(t)) for name, t in model.state_dict().items()}
    modules = dict(model.named_modules())
    return {
        "state": state,
        "kinds": {path: (type(module), id(module), module.training) for path, module in modules.items()},
        "attributes": {path: sorted(vars(module)) for path, module in modules.items()},
        "parameters": {name: (id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "hooks": [
            (path, len(module._forward_hooks), len(module._forward_pre_hooks)) for path, module in modules.items()
        ],
    }


# -- independent readings ----------------------------------------------------------------------------------------------

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def plain_reading(folder: Path) -> Tensor:
    """Logits of W + s · B A, added to the base's weights in float64; the files read without anybody's library."""
    model = base()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    read = tensors_of(folder / TENSORS)
    for path in sorted({key.split(".lora_")[0].removeprefix(PREFIX) for key in read}):
        A, B = (read.pop(f"{PREFIX}{path}.lora_{letter}.weight").double() for letter in "AB")
        alpha = config.get("lora_alpha", 8)  # peft's default
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        r = A.shape[0]
        scale = alpha / (r**0.5 if config.get("use_rslora") else r)
        weight = model.get_submodule(path).weight
        with torch.no_grad():
            weight.copy_(weight.double() + scale * (B @ A))
    assert not read, f"tensors that nobody reads: {sorted(read)}"
    return logits(model)


def tensors_of(file: Path) -> dict[str, Tensor]:
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    found = {}
    for key, entry in json.loads(content[8:end]).items():
        if key != "__metadata__":
            first, last = entry["data_offsets"]
            data = bytearray(content[end + first : end + last])
            found[key] = torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]).view(entry["shape"])
    return found


def peft_reading(folder: Path) -> Tensor:
    """Logits by peft, which changes the base where the initialisation was relative to a changed one."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(base(), folder).eval())


READINGS = {"plain": plain_reading, "peft": peft_reading}


# -- the good adapters -------------------------------------------------------------------------------------------------


def randomise(model: nn.Module) -> None:
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0.0, 0.3, generator=dice)


def write_by(source: str, folder: Path) -> None:
    model = base()
    if source == "ours":
        handle = lt.attach(model, lt.LoraConfig(**SETTINGS))
        randomise(model)
        handle.save(folder)
        return
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**copy.deepcopy(SETTINGS)))
        randomise(wrapped)
        wrapped.save_pretrained(str(folder))


# -- the verdict -------------------------------------------------------------------------------------------------------


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """A pipe that nobody writes to or an endless pattern ends here instead of ending the run."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def refusal_of(act: Callable[[], object], model: nn.Module) -> LoratuneError | None:
    """The refusal, with the model checked to be what it was; None where `act` succeeds."""
    before = photograph(model)
    refusal: LoratuneError | None = None
    try:
        with limited(SECONDS):
            act()
    except LoratuneError as error:
        refusal = error
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise AssertionError(f"neither a success nor a refusal: {type(error).__name__}: {str(error)[:200]}") from error
    if refusal is not None:
        assert refusal.problems, "an error without a problem"
        assert all(problem.strip() for problem in refusal.problems), refusal.problems
        str(refusal).encode()  # a console can show it
        after = photograph(model)
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"refused, but the model's {changed} are not what they were"
    return refusal


def judge(folder: Path, mutation: Mutation, expected: Tensor, attach: Attach = lt.attach) -> None:
    """Raise AssertionError unless what comes of the folder is what the mutation allows."""
    model = base()
    refusal = refusal_of(lambda: attach(model, folder), model)
    assert not (folder / MARKER).exists(), "a pickle was opened"
    outside = folder.parent / OUTSIDE
    assert not outside.is_dir() or list(outside.iterdir()), "reading took a file from another folder"
    if refusal is not None:
        assert mutation.expect != SAME, f"refused: {refusal}"
        with pytest.raises(AdapterStateError):
            lt.adapters(model)
        loads_no_better(folder, type(refusal))
        return
    assert mutation.expect != REFUSED, "it was accepted"
    found = logits(model)
    assert found.isfinite().all(), "accepted, and the outputs are not finite"
    if mutation.expect == SAME:
        assert torch.equal(found, expected), f"the outputs differ by {gap(found, expected):.2g}"
    reading = READINGS[mutation.judge](folder)
    assert gap(found, reading) < 1e-4, f"another reading of the files differs by {gap(found, reading):.2g}"
    saves_and_loads(folder, model, found)


def loads_no_better(folder: Path, kind: type[LoratuneError]) -> None:
    """A second adapter beside a working one is refused alike, and the working one still works."""
    model = base()
    handle = lt.attach(model, lt.LoraConfig(**SETTINGS))
    randomise(model)
    before = logits(model)
    refusal = refusal_of(lambda: handle.load(folder, "second"), model)
    assert type(refusal) is kind, f"attach raised {kind.__name__}, load {refusal!r}"
    assert handle.names == handle.active == ("default",)
    assert torch.equal(logits(model), before)


def saves_and_loads(folder: Path, model: nn.Module, found: Tensor) -> None:
    """What was accepted can be written again and read back, or refuses that by name."""
    handle = lt.adapters(model)
    if refusal_of(lambda: handle.save(folder.parent / "again"), model) is None:
        twin = base()
        lt.attach(twin, folder.parent / "again")
        assert torch.equal(logits(twin), found), "written and read again it is another adapter"
