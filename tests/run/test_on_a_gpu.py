"""Whole runs on CUDA against the same runs on a CPU, and what only CUDA has: 8-bit optimizers, its own allocator."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratune as lt
from loratune.data.batch import make_batch
from loratune.engine.batch import Chosen, Engine, Limits, Request
from loratune.engine.choose import Sampling
from loratune.errors import RunInterrupted
from loratune.estimation import BaseMemory, Pass, Shape, estimate_memory
from loratune.loss import summed_loss
from loratune.model import fuse, recompute_activations, use_packed_attention, why_not_packed
from loratune.quant import FORMATS, quantize
from loratune.run import train
from tests.launch import launched
from tests.models import PAD, VOCABULARY, additions, rows_of, saved, tiny, write_jsonl
from tests.run.conftest import QUICK
from tests.run.test_resume import adapter_bytes, losses_of, stop_at
from tests.run.test_several_processes import words

pytestmark = pytest.mark.gpu

Quick = Callable[..., Any]

# Heads as wide as kernels for blocks want them.
WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
}
SYSTEM = "You add two numbers and answer with nothing but the sum, without a word of explanation. " * 3


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def base(family: str) -> str:
        if family not in made:
            made[family] = str(saved(tmp_path_factory.mktemp("wide") / family, family, **WIDE))
        return made[family]

    return base


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"prompt": SYSTEM + row["prompt"], "completion": row["completion"]} for row in additions(24)]
    return str(write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows))


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is compiled for the device, never segment by segment: that would be right, and slow in silence."""

    def slow(*_: Any) -> Any:
        pytest.fail("attention went segment by segment")

    monkeypatch.setattr("loratune.model.attention._by_segment", slow)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_a_run_learns_as_on_a_cpu(family: str, wide: Any, chats: str, quick: Quick, tmp_path: Path) -> None:
    """In fp32, packed, with a prefix that all rows share."""
    plain = {"model": wide(family), "data": chats, "lora_dropout": 0.0}
    there, here = quick(tmp_path / "gpu", **plain, device="cuda"), quick(tmp_path / "cpu", **plain)
    assert losses_of(there.path) == pytest.approx(losses_of(here.path), rel=1e-3)
    assert there.record["result"]["val_loss"] == pytest.approx(here.record["result"]["val_loss"], rel=1e-3)
    assert losses_of(there.path)[-1] < losses_of(there.path)[0]


METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"quant": "nf4"},
    "int8": {"quant": "int8"},
    "dora": {"use_dora": True},
    "vera": {"method": "vera", "r": 8},
    "ia3": {"method": "ia3", "r": None, "lora_dropout": None},
    "embeddings": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "rows of tokens": {"trainable_token_indices": list(range(3, 40))},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "biases": {"family": "gpt2", "bias": "lora_only"},
    "experts": {"family": "mixtral", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_as_on_a_cpu(name: str, wide: Any, data: str, quick: Quick, tmp_path: Path) -> None:
    """Its checks hold there too: step 0, reload, merge, the base's bits."""
    changes = {"family": "llama", "lora_dropout": 0.0, **METHODS[name]}
    plain = {"model": wide(changes.pop("family")), "data": data, **changes}
    there, here = quick(tmp_path / "gpu", **plain, device="cuda"), quick(tmp_path / "cpu", **plain)
    assert losses_of(there.path) == pytest.approx(losses_of(here.path), rel=2e-3)
    assert losses_of(there.path)[-1] < losses_of(there.path)[0]
    assert [check["name"] for check in there.record["checks"] if not check["passed"]] == []


@pytest.mark.parametrize("experts_implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_experts_in_each_of_transformers_ways(experts_implementation: str, dtype: torch.dtype) -> None:
    """Gradients of A and B on CUDA against those of the loop over experts in fp64 on a CPU."""
    torch.manual_seed(0)
    base = tiny("mixtral", **WIDE).to(dtype)
    config = lt.LoraConfig(
        r=4, target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules="dummy-target-modules",
        init_lora_weights=False,
    )  # fmt: skip
    exact = tiny("mixtral", **WIDE)
    exact.load_state_dict(base.state_dict())
    ids = torch.randint(3, VOCABULARY, (2, 60))
    lora = lt.attach(base, config)
    start = [p.detach().double() for p in lora.parameters()]

    def gradients(model: Any, handle: Any) -> list[torch.Tensor]:
        device = next(model.parameters()).device
        model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
        return [p.grad.double().cpu() for p in handle.parameters()]

    exact.double().set_experts_implementation("eager")
    right = lt.attach(exact, config)
    with torch.no_grad():
        for p, t in zip(right.parameters(), start, strict=True):
            p.copy_(t)
    base.to("cuda").set_experts_implementation(experts_implementation)
    bound = 1e-4 if dtype == torch.float32 else 0.15
    for mine, theirs in zip(gradients(base, lora), gradients(exact, right), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < bound


def test_bf16_is_near_fp32(wide: Any, chats: str, quick: Quick, tmp_path: Path) -> None:
    plain = {"model": wide("llama"), "data": chats, "lora_dropout": 0.0, "device": "cuda"}
    rough, fine = quick(tmp_path / "bf16", **plain, dtype="bf16"), quick(tmp_path / "fp32", **plain)
    assert losses_of(rough.path) == pytest.approx(losses_of(fine.path), rel=2e-2)
    assert losses_of(rough.path) != losses_of(fine.path)


def test_full_fine_tuning_learns_as_on_a_cpu(wide: Any, data: str, tmp_path: Path) -> None:
    plain: dict[str, Any] = {**QUICK, "method": "full", "lr": 1e-3}
    del plain["r"]
    there, here = (
        train(wide("llama"), data, **{**plain, "out": str(tmp_path / device), "device": device})
        for device in ("cuda", "cpu")
    )
    assert losses_of(there.path) == pytest.approx(losses_of(here.path), rel=2e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_interrupted_and_continued(optimizer: str, wide: Any, chats: str, quick: Quick, tmp_path: Path) -> None:
    """To the same bits, dropout and the optimizer's states included; ranks wide enough for states of 8 bits."""
    plain = {"model": wide("llama"), "data": chats, "lora_dropout": 0.1, "r": 64, "device": "cuda", "lr": 1e-3}
    plain |= {"optimizer": optimizer}
    whole = quick(tmp_path / "whole", **plain)
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", **plain, listen=stop_at(3, signal.SIGINT))
    assert adapter_bytes(quick(tmp_path / "run", **plain).path) == adapter_bytes(whole.path)
    settings = json.loads((whole.path / "record.json").read_text())["settings"]
    assert settings["optimizer"]["value"] == optimizer


@pytest.mark.parametrize("how", ["fused", "stock", "recomputed", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_planned_peak(family: str, how: str) -> None:
    """What the plan says of a step beyond the base, against CUDA's allocator; wide enough that rounding is little."""
    widths = {**WIDE, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "head_dim": 64}
    widths |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8000}
    model = tiny(family, **widths).to("cuda", torch.bfloat16)
    quant = how if how in FORMATS else None
    planned = BaseMemory.of(model, 2, quant)
    if quant is not None:
        quantize(model, quant)
    use_packed_attention(model)
    lora = lt.attach(model, lt.LoraConfig(r=8, target_modules="all-linear"))
    if how != "stock":
        assert fuse(model)
    if how == "recomputed":
        recompute_activations(model.train())
    batch = make_batch(rows_of(*[256] * 16), packed=True, pad_id=PAD).to(torch.device("cuda"))
    for _ in range(2):  # gradients stand, kernels are compiled
        summed_loss(model, batch).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    summed_loss(model, batch).backward()
    held = torch.cuda.max_memory_allocated() - before
    through = Pass(2, batch.computed_tokens, batch.supervised, 256, how == "recomputed", how != "stock", "cuda")
    memory = estimate_memory(lora.plan(), Shape.of(model), through, planned)
    assert memory.activations + memory.working == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_rows_with_adapters_of_their_own(family: str) -> None:
    """The engine's greedy answers on CUDA: what each row gives alone there."""
    model = tiny(family, **WIDE).to("cuda")
    assert why_not_packed(model) is None
    lora = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), name="a")
    lora.add(lt.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights=False), "b")
    asked = [(tuple(range(3 + n, 12 + 3 * n)), (None, "a", "b")[n % 3], 4 + n) for n in range(9)]

    def answers(slots: int) -> list[list[int]]:
        engine = Engine(model, lora, Limits(slots=slots, prompt_tokens=64))
        tickets = [
            engine.submit(Request(prompt, frozenset({VOCABULARY}), Sampling(max_new_tokens=count), adapter=name))
            for prompt, name, count in asked
        ]
        told: list[Chosen] = []
        while engine.busy:
            told += engine.step()
        return [[chosen.token for chosen in told if chosen.ticket == ticket] for ticket in tickets]

    together = answers(6)
    assert together == answers(1)
    assert len({tuple(row[:4]) for row in together}) > 3


def test_merged_into_the_base() -> None:
    model = tiny("llama", **WIDE).to("cuda")
    lora = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(3, 40, device="cuda")[None]
    with torch.no_grad():
        right, bare = model(input_ids=ids).logits, None
        with lora.disabled():
            bare = model(input_ids=ids).logits
        lora.merge()
        merged = model(input_ids=ids).logits
        lora.unmerge()
        assert torch.equal(model(input_ids=ids).logits, right)
    assert float((merged - right).norm() / right.norm()) < 1e-5
    assert float((bare - right).norm() / right.norm()) > 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two processes need two GPUs")
@pytest.mark.parametrize("shard", ["off", "on"])
def test_two_gpus_train_what_one_trains(shard: str, wide: Any, data: str, tmp_path: Path) -> None:
    plain = {**QUICK, "device": "cuda", "lora_dropout": 0.1, "checks": "fast"}
    command = ["-m", "loratune", *words(wide("llama"), data, tmp_path / "two", {**plain, "shard": shard})]
    done = launched("torchrun", command, gpus=True)
    assert done.returncode == 0, done.stderr
    one = train(wide("llama"), data, out=str(tmp_path / "one"), **plain).path
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), rel=1e-4)
