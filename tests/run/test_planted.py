"""A fault for every self-check, planted in a run: it ends with that check's name. No check without a fault.

The checks' own tests are in tests/training/test_checks.py; here it is seen that a run makes them, and stops.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.adapt import Adapters
from loratune.adapter import Factors
from loratune.data.tasks import DATA_TASKS
from loratune.errors import AdapterFileError, CheckError, DataError, LoratuneError
from loratune.lora import LowRank
from loratune.run import open_run
from tests.contract.house import REPOSITORY
from tests.models import additions, write_jsonl

Quick = Callable[..., Any]
Counted = Callable[..., None]
Patch = pytest.MonkeyPatch
TRAIN = importlib.import_module("loratune.run.train")  # importlib: the package's name for it is the function
PROOF = "loratune.run.proof"


def after_attach(patch: Patch, spoil: Callable[[Adapters], Any]) -> None:
    """Spoil the adapter as soon as it is attached."""
    attach = TRAIN.attach

    def spoiled(*args: Any) -> Adapters:
        lora: Adapters = attach(*args)
        with torch.no_grad():
            spoil(lora)
        return lora

    patch.setattr(TRAIN, "attach", spoiled)


def after_training(patch: Patch, spoil: Callable[[Any, Adapters], Any]) -> None:
    """Spoil model or adapter after the last checkpoint."""
    save = TRAIN.save_checkpoint

    def spoiled(folder: Path, lora: Adapters, *args: Any, **more: Any) -> Path:
        written: Path = save(folder, lora, *args, **more)
        with torch.no_grad():
            spoil(lora.model, lora)
        return written

    patch.setattr(TRAIN, "save_checkpoint", spoiled)


def one(lora: Adapters) -> LowRank:
    return lora.factors()["model.layers.1.mlp.up_proj"]


def masks(patch: Patch, change: Callable[[tuple[bool, ...]], tuple[bool, ...]]) -> None:
    """Render the rows with other loss masks."""
    task = DATA_TASKS["CAUSAL_LM"]

    def changed(*args: Any, **more: Any) -> Any:
        corpus = task.render(*args, **more)
        return replace(corpus, rows=tuple(replace(row, supervised=change(row.supervised)) for row in corpus.rows))

    patch.setitem(DATA_TASKS, "CAUSAL_LM", replace(task, render=changed))


def without_the_last(mask: tuple[bool, ...]) -> tuple[bool, ...]:
    last = max(i for i, supervised in enumerate(mask) if supervised)
    return tuple(supervised and i != last for i, supervised in enumerate(mask))


def rounded(patch: Patch) -> None:
    saved = Adapters.saved

    def in_bf16(self: Adapters, name: str | None = None) -> Any:
        value = saved(self, name)
        factors = {path: Factors(f.A.bfloat16(), f.B.bfloat16()) for path, f in value.factors.items()}
        return replace(value, factors=factors)

    patch.setattr(Adapters, "saved", in_bf16)


def rescaled(patch: Patch) -> None:
    saved = Adapters.saved

    def doubled(self: Adapters, name: str | None = None) -> Any:
        value = saved(self, name)
        return replace(value, config=value.config.replace(lora_alpha=2 * value.config.lora_alpha))

    patch.setattr(Adapters, "saved", doubled)


def merged_by(patch: Patch, factor: float) -> None:
    delta = LowRank.delta
    patch.setattr(LowRank, "delta", lambda self, weight: delta(self, weight) * factor)


def forgetful(patch: Patch) -> None:
    unmerge = Adapters.unmerge

    def almost(self: Adapters) -> None:
        unmerge(self)
        self.model.model.norm.weight.data[0] += 1e-3

    patch.setattr(Adapters, "unmerge", almost)


def left_out(patch: Patch) -> None:
    groups = Adapters.param_groups

    def without_one(self: Adapters, *args: Any, **more: Any) -> Any:
        B = one(self).B
        found = groups(self, *args, **more)
        return [{**group, "params": [p for p in group["params"] if p is not B]} for group in found]

    patch.setattr(Adapters, "param_groups", without_one)


LOFTQ = {"quant": "nf4", "init_lora_weights": "loftq"}

# Check → fault → how it is planted; further settings of the run.
PLANTED: dict[str, dict[str, tuple[Callable[[Patch], Any], dict[str, Any]]]] = {
    "step 0 ≡ base": {
        "a B that does not start at zero": (lambda p: after_attach(p, lambda lora: one(lora).B[0].fill_(1e-3)), {}),
    },
    "nearer to the unquantised base": {
        "a start of the wrong sign": (lambda p: after_attach(p, lambda lora: one(lora).B.neg_()), LOFTQ),
    },
    "grads only in A, B": {
        "a frozen B": (lambda p: after_attach(p, lambda lora: one(lora).B.requires_grad_(False)), {}),
        "a frozen A": (lambda p: after_attach(p, lambda lora: one(lora).A.requires_grad_(False)), {}),
        "a base weight that trains": (
            lambda p: after_attach(p, lambda lora: lora.model.model.norm.weight.requires_grad_(True)),
            {},
        ),
    },
    "end of turn supervised": {
        "an end of turn outside the loss": (lambda p: masks(p, without_the_last), {}),
        "a mask shifted to the left": (lambda p: masks(p, lambda mask: (*mask[1:], False)), {}),
        "a mask shifted to the right": (lambda p: masks(p, lambda mask: (False, *mask[:-1])), {}),
    },
    "one batch overfits": {
        "an optimizer that does nothing": (lambda p: p.setattr(torch.optim.AdamW, "step", lambda *_: None), {}),
        "gradients of the wrong sign": (
            lambda p: after_attach(p, lambda lora: [t.register_hook(torch.neg) for t in lora.parameters()]),
            {},
        ),
    },
    "every B moved": {
        "a B that the optimizer does not know": (left_out, {}),
        "a rate too small for fp32": (lambda _: None, {"lr": 1e-60}),
    },
    "finite": {
        "a NaN in B": (lambda p: after_training(p, lambda _, lora: one(lora).B[0, 0].fill_(torch.nan)), {}),
        "an infinity in A": (lambda p: after_training(p, lambda _, lora: one(lora).A[1, 1].fill_(torch.inf)), {}),
    },
    "reload ≡ live": {
        "an adapter written in bf16": (rounded, {}),
        "an alpha that doubles on its way": (rescaled, {}),
    },
    "merged ≡ adapter": {
        "half the scale": (lambda p: merged_by(p, 0.5), {}),
        "the wrong sign": (lambda p: merged_by(p, -1.0), {}),
        "a base that is not restored": (forgetful, {}),
    },
    "off ≡ base, on ≠ base": {
        "a base weight that changed": (
            lambda p: after_training(p, lambda model, _: model.model.layers[0].mlp.up_proj.weight[0].mul_(1.05)),
            {},
        ),
        "the embedding of a token that no probe holds": (
            lambda p: after_training(p, lambda model, _: model.model.embed_tokens.weight[399].add_(1.0)),
            {},
        ),
        "one value of a base weight, in its last bit": (
            lambda p: after_training(p, lambda model, _: model.model.embed_tokens.weight[399, 5].mul_(1 + 2**-22)),
            {},
        ),
        "an adapter without an effect": (
            lambda p: after_training(p, lambda _, lora: [low_rank.B.zero_() for low_rank in lora.factors().values()]),
            {},
        ),
    },
}


def one_for_each_and_all_in_full() -> list[Any]:
    return [
        pytest.param(check, fault, marks=pytest.mark.full if number else ())
        for check, faults in PLANTED.items()
        for number, fault in enumerate(faults)
    ]


@pytest.mark.parametrize(("check", "fault"), one_for_each_and_all_in_full())
def test_run_ends_with_the_check(
    check: str, fault: str, quick: Quick, tmp_path: Path, monkeypatch: Patch, counted: Counted
) -> None:
    plant, settings = PLANTED[check][fault]
    plant(monkeypatch)
    with pytest.raises(CheckError) as caught:
        quick(tmp_path / "run", checks="full", **settings)
    assert caught.value.exit_code == 4
    assert any(problem.startswith(f"{check}: ") for problem in caught.value.problems), caught.value.problems
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["state"] == "failed"
    assert check in {found["name"] for found in record["checks"] if not found["passed"]}
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    counted("fault that a self-check must catch")


def test_sound_runs_end_with_none_of_them(quick: Quick, tmp_path: Path) -> None:
    names = set()
    for number, settings in enumerate(({}, LOFTQ)):
        run = quick(tmp_path / str(number), checks="full", **settings)
        names |= {check["name"] for check in run.record["checks"]}
    assert names == set(PLANTED)


def checks_in(source: str) -> set[str]:
    """The names of the checks that a module makes."""
    made = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "Check"
    ]
    return {ast.literal_eval(node.args[0]) for node in made}


def test_every_check_has_a_fault() -> None:
    sources = (REPOSITORY / "src").rglob("*.py")
    found = set().union(*(checks_in(path.read_text(encoding="utf-8")) for path in sources))
    # What several processes check of each other is planted in tests/training/test_processes.py.
    assert found == set(PLANTED) | {"one adapter everywhere"}
    assert checks_in('def f():\n    return checks.Check("new", "after", True, "")') == {"new"}


# -- what is written is read back -------------------------------------------------------------------------------------


EXPORT = importlib.import_module("loratune.run.export")
GGUF = importlib.import_module("loratune.gguf.model")


def another_gguf(patch: Patch) -> tuple[str, ...]:
    write = EXPORT.write_gguf
    patch.setattr(
        EXPORT, "write_gguf", lambda path, adapter, *rest, **more: write(path, halved(adapter), *rest, **more)
    )
    return ("--to", "gguf")


def another_adapter(patch: Patch) -> tuple[str, ...]:
    write = EXPORT.write_adapter
    patch.setattr(EXPORT, "write_adapter", lambda path, adapter, **more: write(path, halved(adapter), **more))
    return ("--to", "vllm")


def halved(adapter: Any) -> Any:
    factors = {path: f._replace(B=f.B / 2) for path, f in adapter.factors.items()}
    return replace(adapter, factors=factors)


def another_model(patch: Patch) -> tuple[str, ...]:
    turned = GGUF.turned
    # As often as it is asked for: what is written and what is compared then differ.
    calls = iter(range(10**6))
    patch.setattr(GGUF, "turned", lambda *args: turned(*args) * (0.5 if next(calls) == 3 else 1.0))
    return ("--to", "gguf", "--merged")


def too_large_for_fp16(patch: Patch) -> tuple[str, ...]:
    state = EXPORT._plain_state

    @contextlib.contextmanager
    def with_one_large(opened: Any) -> Iterator[Any]:
        with state(opened) as (tensors, checks):
            name = "model.layers.0.mlp.up_proj.weight"
            yield {**tensors, name: tensors[name] * 1e9}, checks

    patch.setattr(EXPORT, "_plain_state", with_one_large)
    return ("--to", "gguf", "--merged", "--dtype", "fp16")


# The function that raises → how it is made to.
READ_BACK: dict[str, Callable[[Patch], tuple[str, ...]]] = {
    "_gguf": another_gguf,
    "export": another_adapter,
    "compare_model": another_model,
    "tensors": too_large_for_fp16,
}


@pytest.mark.parametrize("function", READ_BACK)
def test_what_is_read_back_must_be_what_was_written(
    function: str, finished: Path, tmp_path: Path, monkeypatch: Patch, counted: Counted
) -> None:
    words = READ_BACK[function](monkeypatch)
    options = {"to": words[1], "merged": "--merged" in words, "dtype": words[-1] if "--dtype" in words else "auto"}
    with pytest.raises(CheckError) as caught:
        EXPORT.export(str(finished), str(tmp_path / "out"), **options)
    assert function in [entry.name for entry in caught.traceback]
    counted("fault that a self-check must catch")


def raisers_in(source: str) -> set[str]:
    """The functions of a module that raise a `CheckError` of their own."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {
        function.name
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Raise) and "CheckError" in ast.dump(node)
    }


def test_every_other_check_has_a_fault() -> None:
    sources = (REPOSITORY / "src").rglob("*.py")
    found = set().union(*(raisers_in(path.read_text(encoding="utf-8")) for path in sources))
    # `require` raises for the checks above; what `reproduce` finds is planted in tests/run/test_reproduce.py.
    assert found == set(READ_BACK) | {"require", "reproduce"}


# -- what is refused rather than checked ------------------------------------------------------------------------------


def another_merge_rule(folder: Path, base: Path) -> str:
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    merges = tokenizer["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    path.write_text(json.dumps(tokenizer))
    return "another tokenizer"


def another_template(folder: Path, base: Path) -> str:
    path = base / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>{{ message.role }}\n", "<|im_start|>{{ message.role }} "))
    return "another chat template"


def another_base(folder: Path, base: Path) -> str:
    return tensors_of(base / "model.safetensors", lambda t: t["model.norm.weight"][3].add_(0.1), "has other weights")


def tensors_of(path: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str) -> str:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return said


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
ADAPTER = "adapter_model.safetensors"

REFUSED: dict[str, Callable[[Path, Path], str]] = {
    "a tokenizer with two merge rules in another order": another_merge_rule,
    "another chat template": another_template,
    "another base, by one weight": another_base,
    "a NaN in the adapter's file": lambda run, _: tensors_of(
        run / ADAPTER, lambda t: t[KEY][0, 0].fill_(torch.nan), "holds NaN or infinity"
    ),
    "a tensor that is missing": lambda run, _: tensors_of(run / ADAPTER, lambda t: t.pop(KEY), "up_proj"),
    "a tensor of another shape": lambda run, _: tensors_of(
        run / ADAPTER, lambda t: t.update({KEY: t[KEY][:-1].clone()}), "up_proj"
    ),
    "a tensor of a module that is not there": lambda run, _: tensors_of(
        run / ADAPTER,
        lambda t: t.update({KEY.replace("up_proj", "side_proj"): t[KEY].clone()}),
        "side_proj",
    ),
    "a file cut short": lambda run, _: (run / ADAPTER).write_bytes((run / ADAPTER).read_bytes()[:-10]) and "damaged",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_adapter_is_refused(fault: str, finished: Path, base: str, tmp_path: Path, counted: Counted) -> None:
    run, own = tmp_path / "run", tmp_path / "base"
    shutil.copytree(finished, run)
    shutil.copytree(base, own)
    assert open_run(str(run), base=str(own)).lora is not None
    said = REFUSED[fault](run, own)
    with pytest.raises(AdapterFileError, match=said):
        open_run(str(run), base=str(own))
    counted("fault that a refusal must catch")


ROWS: dict[str, tuple[Any, str]] = {
    "a row without an answer": ({"prompt": "1 + 1 =", "completion": ""}, "rows.jsonl:25"),
    "a row of another shape": ({"question": "1 + 1 ="}, "rows.jsonl:25"),
    "a row that is no object": (["1 + 1 ="], "rows.jsonl:25"),
}


@pytest.mark.parametrize("fault", ROWS)
def test_row_is_refused(fault: str, quick: Quick, tmp_path: Path, counted: Counted) -> None:
    row, said = ROWS[fault]
    with pytest.raises(DataError, match=said):
        quick(tmp_path / "run", data=str(write_jsonl(tmp_path / "rows.jsonl", [*additions(24), row])))
    assert not (tmp_path / "run").exists()
    counted("fault that a refusal must catch")


TEMPLATES = {
    "a template that forgets the answer": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "a template with another start each time": (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_template_is_refused(fault: str, quick: Quick, base: str, tmp_path: Path, counted: Counted) -> None:
    """A loss mask is never guessed."""
    own = tmp_path / "base"
    shutil.copytree(base, own)
    (own / "chat_template.jinja").write_text(TEMPLATES[fault])
    with pytest.raises(LoratuneError) as caught:
        quick(tmp_path / "run", model=str(own))
    assert isinstance(caught.value, DataError), caught.value
    assert not (tmp_path / "run").exists()
    counted("fault that a refusal must catch")
