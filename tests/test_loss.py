"""The objective against a slow float64 formula, and that no logits are computed which nobody scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import loratune as lt
from loratune import loss as loss_module
from loratune.data.batch import Batch, make_batch, offsets, tree_of
from loratune.data.render import Rendered
from loratune.lora import TokenCounter
from loratune.loss import cross_entropy, logits_of, summed_loss
from loratune.model import adapter_training, has_separate_head, use_packed_attention
from tests.models import FAMILIES, PAD, branching_rows, exact, rows_of, tiny
from tests.oracle.loss import row_loss, supervised
from tests.training.loops import assert_close

ROWS = rows_of(9, 14, 2, 11, 20)


def batches_of(rows: Sequence[Rendered], how: str) -> list[Batch]:
    if how == "row by row":
        return [make_batch([row], packed=True, pad_id=PAD) for row in rows]
    if how == "two halves":
        return [make_batch(half, packed=True, pad_id=PAD) for half in (rows[:2], rows[2:])]
    return [make_batch(rows, packed=how == "packed", pad_id=PAD)]


def trainable(family: str) -> Any:
    return tiny(family).requires_grad_(True)


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("how", ["packed", "padded", "row by row", "two halves"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_loss_and_gradients_against_the_oracle(family: str, how: str) -> None:
    model, twin = trainable(family), exact(family).requires_grad_(True)
    oracle = torch.stack([row_loss(twin, row) for row in ROWS]).sum()
    use_packed_attention(model)
    loss = torch.stack([summed_loss(model, batch) for batch in batches_of(ROWS, how)]).sum()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)
    assert_close(gradients(model, loss), gradients(twin, oracle), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mixtral", "phi3"])
def test_shared_prefixes_give_the_loss_and_gradients_of_the_rows_alone(family: str) -> None:
    rows = branching_rows()
    model, twin = trainable(family), exact(family).requires_grad_(True)
    oracle = torch.stack([row_loss(twin, row) for row in rows]).sum()
    use_packed_attention(model)
    batch = make_batch(rows, packed=True, pad_id=PAD, tree=tree_of(rows))
    assert batch.computed_tokens < 0.6 * sum(len(row.ids) for row in rows)
    assert batch.supervised == sum(sum(row.supervised) for row in rows)
    assert batch.times is not None
    loss = summed_loss(model, batch)
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)
    assert_close(gradients(model, loss), gradients(twin, oracle), rel=1e-5)


@pytest.mark.parametrize("fault", ["no prefix is seen", "a target counts once", "positions start anew"])
def test_the_comparison_finds_what_sharing_could_get_wrong(fault: str) -> None:
    rows = branching_rows()
    model, twin = trainable("llama"), exact("llama")
    oracle = torch.stack([row_loss(twin, row) for row in rows]).sum()
    use_packed_attention(model)
    batch = make_batch(rows, packed=True, pad_id=PAD, tree=tree_of(rows))
    assert batch.segments is not None
    anew = torch.cat([torch.arange(length) for length in batch.segments])[None]
    faulty = {
        "no prefix is seen": {"above": None},
        "a target counts once": {"times": None},
        "positions start anew": {"position_ids": anew},
    }
    loss = summed_loss(model, replace(batch, **faulty[fault]))
    assert loss.item() != pytest.approx(oracle.item(), rel=2e-5)


def test_family_that_cannot_be_packed() -> None:
    model, twin = trainable("gemma2"), exact("gemma2").requires_grad_(True)
    oracle = torch.stack([row_loss(twin, row) for row in ROWS]).sum()
    loss = summed_loss(model, make_batch(ROWS, packed=False, pad_id=PAD))
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)
    assert_close(gradients(model, loss), gradients(twin, oracle), rel=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("packed", [True, False])
def test_head_sees_scored_positions_only(family: str, packed: bool) -> None:
    model = tiny(family)
    if packed and family == "gemma2":
        packed = False
    if packed:
        use_packed_attention(model)
    batch = make_batch(ROWS, packed=packed, pad_id=PAD)
    seen: list[tuple[int, ...]] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(tuple(call[-1].shape)))
    logits = logits_of(model, batch)
    hook.remove()
    assert seen == [(1, supervised(ROWS), 400)]
    assert logits.shape == (supervised(ROWS), 400)
    assert supervised(ROWS) < batch.input_ids.numel()


def test_head_is_left_without_hooks() -> None:
    model = tiny()
    batch = make_batch(ROWS, packed=False, pad_id=PAD)
    logits_of(model, batch)
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=batch.input_ids).logits.shape[:2] == batch.input_ids.shape


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 600])
def test_cross_entropy_in_chunks(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, 50, generator=generator) * 4).requires_grad_(True)
    targets = torch.randint(50, (rows,), generator=generator)
    double = logits.detach().double().requires_grad_(True)
    oracle = (torch.logsumexp(double, 1) - double[torch.arange(rows), targets]).sum()
    loss = cross_entropy(logits, targets)
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-6)
    loss.backward()
    oracle.backward()
    assert logits.grad is not None
    assert double.grad is not None
    assert_close([logits.grad], [double.grad], rel=1e-6)


def test_bf16_logits_are_scored_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(300, 50, generator=generator) * 4).bfloat16()
    targets = torch.randint(50, (300,), generator=generator)
    double = logits.double()
    oracle = (torch.logsumexp(double, 1) - double[torch.arange(300), targets]).sum()
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)


def test_no_fp32_copy_of_all_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's fp32 logits are computed again in the backward pass: nothing of their size is saved for it."""
    logits = torch.randn(1024, 64, dtype=torch.bfloat16, requires_grad=True)
    sizes: list[tuple[int, torch.dtype]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append((t.numel(), t.dtype)), t)[1], lambda t: t):
        cross_entropy(logits, torch.randint(64, (1024,)))
    assert not [size for size in sizes if size[1] == torch.float32 and size[0] >= 64 * 64]


def test_leak_between_rows_would_be_seen() -> None:
    """Packed rows in a model that ignores where they end: the comparison with the oracle fails, as it must."""
    model = tiny()
    use_packed_attention(model)
    batch = make_batch(ROWS, packed=True, pad_id=PAD)
    right = float(summed_loss(model, batch))
    leaking = float(summed_loss(model, _one_segment(batch)))
    assert abs(leaking - right) > 1e-3 * right


def _one_segment(batch: Batch) -> Batch:
    return replace(batch, segments=(batch.input_ids.numel(),))


@pytest.mark.parametrize("config", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}])
def test_a_trained_head_gets_its_gradient_a_chunk_at_a_time(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK", {"cpu": 5})
    model = tiny("llama")
    settings = {"r": 4, "target_modules": ["q_proj"], **config}
    handle = lt.attach(model, lt.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    use_packed_attention(model)
    batch = make_batch(ROWS, packed=True, pad_id=PAD)
    inputs = list(handle.parameters())
    found = torch.autograd.grad(summed_loss(model, batch), inputs)
    whole = torch.nn.functional.cross_entropy(logits_of(model, batch), batch.targets, reduction="sum")
    assert_close(list(found), list(torch.autograd.grad(whole, inputs)), rel=1e-5)
    with handle.disabled():
        assert not summed_loss(model, batch).requires_grad


def test_families_that_change_their_logits_have_a_separate_head() -> None:
    """Soft caps and scales behind the head are applied to a chunk's logits by the model's own forward."""
    for family, change in (("gemma2", {"final_logit_softcapping": 0.5}), ("llama", {})):
        model = tiny(family, **change)
        assert has_separate_head(model)
        batch = make_batch(ROWS, packed=False, pad_id=PAD)
        whole = torch.nn.functional.cross_entropy(logits_of(model, batch), batch.targets, reduction="sum")
        assert summed_loss(model, batch).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("often", [None, torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_torch_as_by_a_kernel(dtype: torch.dtype, often: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 70).mul(5).to(dtype), torch.tensor([0, 69, 3, 8, 35])
    found = []
    for kernels_for in (loss_module.kernels_for, lambda _: None):
        monkeypatch.setattr(loss_module, "kernels_for", kernels_for)
        mine = logits.clone().requires_grad_()
        lost = loss_module.cross_entropy(mine, targets, often)
        found.append((lost.detach(), *torch.autograd.grad(lost, mine)))
    torch.testing.assert_close(found[0], found[1], rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_logits_in_another_order_of_memory() -> None:
    torch.manual_seed(0)
    columns, targets = torch.randn(70, 5), torch.tensor([0, 69, 3, 8, 35])
    found = []
    for logits in (columns.T, columns.T.contiguous()):
        mine = logits.detach().requires_grad_()
        lost = loss_module.cross_entropy(mine, targets)
        found.append((lost.detach(), *torch.autograd.grad(lost, mine)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_what_does_not_fit_is_refused_as_ever() -> None:
    logits, targets = torch.randn(4, 9), torch.tensor([0, 8, 3, 1])
    for odd, times in (
        (targets, torch.ones(2)),
        (targets.float(), None),
        (torch.cat([targets, targets[:2]]), None),
        (targets + 1, None),
        (targets - 1, None),
    ):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            loss_module.cross_entropy(logits, odd, times)


@pytest.mark.parametrize(("scored", "parts"), [(1, [1]), (383, [383]), (385, [193, 192]), (1020, [255] * 4), (0, [])])
def test_logits_come_in_equal_parts(scored: int, parts: list[int]) -> None:
    """A few positions that are left over would take nearly as long as many."""
    size, fine = loss_module.positions_at_once("cpu", scored)
    assert [len(part) for part in torch.arange(scored).split(size) if len(part)] == parts
    assert fine == min(32, scored)


class Elsewhere(torch.nn.Module):
    """A model that mixes into its logits what its head never sees."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.device, self._head = model.model, model.device, model.lm_head

    def get_output_embeddings(self) -> Any:
        return self._head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.base_model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=self._head(hidden) + input_ids[..., None])


def test_a_head_that_is_not_all_there_is_is_found_out() -> None:
    assert not has_separate_head(Elsewhere(tiny("llama")))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], "all-linear", ["lm_head", "q_proj"]])
def test_masks_of_the_head_depend_neither_on_chunks_nor_on_the_split(
    targets: Any, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEMANTICS 4: a token's mask is its own, wherever its logits are computed."""
    model = tiny("llama", tie_word_embeddings=False)
    handle = lt.attach(model, lt.LoraConfig(r=4, target_modules=targets, lora_dropout=0.5))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    use_packed_attention(model)
    adapter_training(model)
    starts = offsets(ROWS)
    found = []
    for chunk, split in ((256, [5]), (3, [5]), (256, [2, 3]), (4, [1] * 5)):
        monkeypatch.setattr(loss_module, "_CHUNK", {"cpu": chunk})
        begin, loss = 0, torch.zeros(())
        for size in split:
            part = slice(begin, begin + size)
            batch = make_batch(ROWS[part], packed=packed, pad_id=PAD, starts=starts[part])
            with handle.counting(TokenCounter(0, 3, batch.tokens)):
                loss = loss + summed_loss(model, batch)
            begin += size
        found.append([loss.detach(), *torch.autograd.grad(loss, handle.parameters())])
    for other in found[1:]:
        assert_close(other, found[0], rel=1e-5)
    batch = make_batch(ROWS, packed=packed, pad_id=PAD)
    with handle.counting(TokenCounter(0, 3, batch.tokens)):
        whole = torch.nn.functional.cross_entropy(logits_of(model, batch), batch.targets, reduction="sum")
    assert whole.item() == pytest.approx(found[0][0].item(), rel=1e-5)
    with handle.counting(TokenCounter(0, 4, batch.tokens)):
        assert summed_loss(model, batch).item() != pytest.approx(whole.item(), rel=1e-4), "nothing was dropped"


def test_hooks_of_the_trunk_hear_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK", {"cpu": 5})
    model = tiny("llama")
    batch = make_batch(ROWS, packed=False, pad_id=PAD)
    assert has_separate_head(model)
    before = vars(model.model).keys()
    heard: list[int] = []
    model.model.register_forward_hook(lambda *_: heard.append(1))
    summed_loss(model, batch)
    assert heard == [1]
    assert vars(model.model).keys() == before


def test_a_loss_in_fp64_is_summed_in_it() -> None:
    batch = make_batch(rows_of(9, 5), packed=False, pad_id=PAD)
    assert summed_loss(exact("llama"), batch).dtype == torch.float64
    assert summed_loss(tiny("llama").bfloat16(), batch).dtype == torch.float32
