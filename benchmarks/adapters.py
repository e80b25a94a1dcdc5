"""What handling adapters costs, beside peft: attach, add, switch, load, save, disable, merge, forward.

python benchmarks/adapters.py                     print the table, write benchmarks/results/adapters.json
python benchmarks/adapters.py --repeats 15 --json elsewhere.json

The model is a Llama of 32 narrow layers with 224 targets, so that what is measured is the handling and not the matrix
products. Before anything is timed, both must compute the same logits from one adapter folder that peft wrote.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "2"  # torch reads it once
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peft
import torch
import transformers
from measuring import Side, Step, held, measured, ratios, shown_bytes, shown_seconds, surroundings
from torch import Tensor

import loratune as lt

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "adapters.json"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
R, ALPHA, MANY = 8, 16, 20
IDS = torch.arange(2 * 64).view(2, 64) * 17 % 256


def tiny(layers: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def our_config() -> lt.LoraConfig:
    return lt.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS)


def their_config() -> Any:
    return peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(TARGETS))


def ours(layers: int, adapters: int = 1) -> lt.Adapters:
    """A fresh model's handle, with adapters `default`, `a1`, `a2`, …"""
    handle = lt.attach(tiny(layers), our_config())
    for number in range(1, adapters):
        handle.add(our_config(), f"a{number}")
    return handle


def theirs(layers: int, adapters: int = 1) -> Any:
    model = peft.get_peft_model(tiny(layers), their_config()).eval()
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", their_config())
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, Tensor)
    return found


# -- parity ------------------------------------------------------------------------------------------------------------


def write_by_peft(layers: int, folder: Path) -> Tensor:
    """An adapter whose B is not zero, and the logits it gives in peft."""
    model = theirs(layers)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.05, generator=dice)
    model.save_pretrained(str(folder))
    return logits(model)


def parity(layers: int, folder: Path) -> float:
    """The largest difference of two logits, relative to the adapter's own effect on them."""
    reference = write_by_peft(layers, folder)
    model = tiny(layers)
    base = logits(model)
    lt.attach(model, folder)
    effect = float((reference - base).abs().max())
    difference = float((logits(model) - reference).abs().max()) / effect
    assert effect > 0.01, f"the adapter moves no logit by more than {effect}: nothing is compared"
    assert difference < 1e-4, f"the logits differ by {difference:.1e} of the adapter's effect: no speed counts"
    return difference


# -- what is timed -----------------------------------------------------------------------------------------------------


def attaching(layers: int) -> dict[str, Side]:
    return {
        "ours": Side(lambda: tiny(layers), [Step("attach", lambda m: lt.attach(m, our_config()))]),
        "peft": Side(lambda: tiny(layers), [Step("attach", lambda m: peft.get_peft_model(m, their_config()))]),
    }


def adding(layers: int) -> dict[str, Side]:
    """The 2nd and the 20th of one model."""

    def steps(add: Callable[[Any, str], object]) -> list[Step]:
        def fill(subject: Any) -> None:
            for number in range(3, MANY):
                add(subject, f"a{number}")

        second, last = (lambda s: add(s, "a2")), (lambda s: add(s, f"a{MANY}"))
        return [Step("add the 2nd", second), Step("", fill), Step(f"add the {MANY}th", last)]

    return {
        "ours": Side(lambda: ours(layers), steps(lambda handle, name: handle.add(our_config(), name))),
        "peft": Side(lambda: theirs(layers), steps(lambda model, name: model.add_adapter(name, their_config()))),
    }


def switching(layers: int, adapters: int) -> dict[str, Side]:
    """There and back between two adapters; peft's also turns `requires_grad` on and off."""
    step = f"switch ×2, {adapters} adapters, {layers} layers"
    handle, model = ours(layers, adapters), theirs(layers, adapters)
    return {
        "ours": Side(lambda: handle, [Step(step, _there_and_back(lambda s, n: s.activate(n)), 1000)]),
        "peft": Side(lambda: model, [Step(step, _there_and_back(lambda s, n: s.set_adapter(n)), 1)]),
    }


def _there_and_back(switch: Callable[[Any, str], object]) -> Callable[[Any], object]:
    def act(subject: Any) -> None:
        switch(subject, "a1")
        switch(subject, "default")

    return act


def filing(layers: int, folder: Path) -> dict[str, Side]:
    """Loading into a fresh model, then saving what was loaded. Ours reaches the disk (fsync), peft's does not wait."""

    def load_ours(subject: dict[str, Any]) -> None:
        subject["handle"] = lt.attach(subject["model"], folder)

    def load_theirs(subject: dict[str, Any]) -> None:
        subject["model"] = peft.PeftModel.from_pretrained(subject["model"], str(folder))

    def fresh() -> dict[str, Any]:
        shutil.rmtree(folder.parent / "saved", ignore_errors=True)
        return {"model": tiny(layers)}

    saved = folder.parent / "saved"
    return {
        "ours": Side(fresh, [Step("load", load_ours), Step("save", lambda s: s["handle"].save(saved))]),
        "peft": Side(
            fresh, [Step("load", load_theirs), Step("save", lambda s: s["model"].save_pretrained(str(saved)))]
        ),
    }


def disabling(layers: int) -> dict[str, Side]:
    def ours_off(handle: lt.Adapters) -> None:
        with handle.disabled():
            pass

    def theirs_off(model: Any) -> None:
        with model.disable_adapter():
            pass

    handle, model = ours(layers), theirs(layers)
    return {
        "ours": Side(lambda: handle, [Step("disable and restore", ours_off, 1000)]),
        "peft": Side(lambda: model, [Step("disable and restore", theirs_off)]),
    }


def merging(layers: int) -> dict[str, Side]:
    return {
        "ours": Side(
            lambda: ours(layers), [Step("merge", lambda h: h.merge()), Step("unmerge", lambda h: h.unmerge())]
        ),
        "peft": Side(
            lambda: theirs(layers),
            [Step("merge", lambda m: m.merge_adapter()), Step("unmerge", lambda m: m.unmerge_adapter())],
        ),
    }


def running(layers: int) -> dict[str, Side]:
    handle, model, base = ours(layers), theirs(layers), tiny(layers)
    return {
        "ours": Side(lambda: handle.model, [Step("forward, 2 × 64 tokens", logits, 3)]),
        "peft": Side(lambda: model, [Step("forward, 2 × 64 tokens", logits, 3)]),
        "base": Side(lambda: base, [Step("forward, 2 × 64 tokens", logits, 3)]),
    }


def holding(layers: int) -> dict[str, Any]:
    def merged_ours(handle: lt.Adapters) -> None:
        handle.merge()

    def merged_theirs(model: Any) -> None:
        model.merge_adapter()

    return {
        "one adapter": {
            "ours": held(lambda: tiny(layers), lambda m: lt.attach(m, our_config())),
            "peft": held(lambda: tiny(layers), lambda m: peft.get_peft_model(m, their_config())),
        },
        "one more": {
            "ours": held(lambda: ours(layers), lambda h: h.add(our_config(), "a1")),
            "peft": held(lambda: theirs(layers), lambda m: m.add_adapter("a1", their_config())),
        },
        # Ours keeps the original weights, which is what makes its unmerge exact; peft subtracts.
        "merged": {
            "ours": held(lambda: ours(layers), merged_ours),
            "peft": held(lambda: theirs(layers), merged_theirs),
        },
    }


# -- the result --------------------------------------------------------------------------------------------------------


def result_of(layers: int, repeats: int) -> dict[str, Any]:
    around = surroundings("loratune", "peft", "torch", "transformers", "safetensors")
    with tempfile.TemporaryDirectory() as place, quiet():
        folder = Path(place) / "adapter"
        difference = parity(layers, folder)
        steps: dict[str, Any] = {}
        makers: list[Callable[[], dict[str, Side]]] = [
            lambda: attaching(layers),
            lambda: adding(layers),
            *(lambda n=n, k=k: switching(n, k) for n in (4, layers) for k in (2, MANY)),
            lambda: filing(layers, folder),
            lambda: disabling(layers),
            lambda: merging(layers),
            lambda: running(layers),
        ]
        for make in makers:
            steps |= measured(make(), repeats)
        bytes_held = holding(layers)
    return {
        **around,
        "model": {"layers": layers, "targets": layers * len(TARGETS), "hidden": 64, "r": R},
        "repeats": repeats,
        "parity": difference,
        "steps": steps,
        "bytes": bytes_held,
        "targets": targets_of(steps, layers),
    }


def targets_of(steps: dict[str, Any], layers: int) -> list[dict[str, Any]]:
    """What is to be reached, what was measured (medians), and whether that reaches it."""
    second, last = (steps[name]["ours"]["samples"] for name in ("add the 2nd", f"add the {MANY}th"))
    few, many = (steps[f"switch ×2, {k} adapters, {n} layers"]["ours"]["median"] for k, n in ((2, 4), (MANY, layers)))
    wanted = [
        ("attach, times faster than peft", ">=", 5.0, steps["attach"]["ratio"]["peft"]["median"]),
        ("load, times faster than peft", ">=", 3.0, steps["load"]["ratio"]["peft"]["median"]),
        (f"the {MANY}th adapter's time by the 2nd's", "<=", 1.2, ratios(last, second)["median"]),
        ("switching there and back, microseconds", "<=", 20.0, many * 1e6),
        (f"switching with {MANY} adapters and {layers} layers, by 2 and 4", "<=", 1.5, many / few),
    ]
    return [
        {
            "what": what,
            "target": f"{sign} {bound:g}",
            "measured": float(f"{found:.3g}"),
            "reached": found >= bound if sign == ">=" else found <= bound,
        }
        for what, sign, bound, found in wanted
    ]


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':34}{'loratune':>22}{'peft':>22}   peft / loratune"]
    for name, step in result["steps"].items():
        cells = "".join(f"{_cell(step[side]):>22}" for side in ("ours", "peft"))
        ratio = step["ratio"]["peft"]
        low, high = ratio["quartiles"]
        lines.append(f"{name:34}{cells}   {ratio['median']:.3g} ({low:.3g} to {high:.3g})")
        if "base" in step:
            lines.append(f"{'  the same without adapters':34}{_cell(step['base']):>22}")
    lines += ["", "bytes held: tensors + Python's objects"]
    for name, sides in result["bytes"].items():
        cells = "".join(
            f"{shown_bytes(s['tensors'])} + {shown_bytes(s['objects']):>8}".rjust(22) for s in sides.values()
        )
        lines.append(f"{name:34}{cells}")
    lines += ["", "targets"]
    for target in result["targets"]:
        word = "reached" if target["reached"] else "MISSED"
        lines.append(f"{target['what']:60}{target['target']:>7}   {target['measured']:<8g}{word}")
    return "\n".join([*lines, "", _how(result)])


def _cell(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{shown_seconds(found['median'])} ±{50 * (high - low) / found['median']:.0f}%"


def _how(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{result['threads']} threads, {result['hardware']['processor']}"
    return (
        f"medians of {result['repeats']} alternating rounds, ± half the distance of the quartiles; {result['date']}, "
        f"{where}; {versions}; logits of both agree within {result['parity']:.0e} of the adapter's effect"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the words that peft and transformers have for a model built from its config."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE", help="where the result goes")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds (default 9, at least 7 to publish)")
    parser.add_argument("--layers", type=int, default=32, metavar="N", help="layers of the model; 32 to publish")
    given = parser.parse_args()
    result = result_of(given.layers, given.repeats)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
