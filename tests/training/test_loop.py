"""The one loop against a textbook's, and that splitting a step changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from loratune.data.pack import Layout
from loratune.errors import DivergedError, OutOfMemoryError
from loratune.training import loop
from loratune.training.events import Noticed, Validated
from loratune.training.processes import Processes
from tests.models import FAMILIES, branching_rows, rows_of, tiny
from tests.oracle import training as textbook
from tests.training.loops import Training, assert_close, assert_same

ROWS = rows_of(9, 14, 6, 11, 20, 8, 5, 17, 12, 7)


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.PADDED])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_against_the_textbook(family: str, layout: Layout) -> None:
    """Losses, norms and weights after several clipped steps with weight decay; float64 against our fp32."""
    changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    ours = Training(ROWS, family, layout=layout, clip=0.5, weight_decay=0.1, limit=30, changes=changes)
    pairs = {path: (x.A.detach().double(), x.B.detach().double()) for path, x in ours.lora.factors().items()}
    base = tiny(family, **changes).double()
    steps = [[ROWS[i] for i in ours.order.step(number)] for number in range(5)]
    losses = textbook.train(base, pairs, 2.0, steps, ours.schedule.lr, clip=0.5, weight_decay=0.1)
    ours.run()
    assert [event.loss for event in ours.steps_heard()] == pytest.approx(losses, rel=1e-5)
    assert any(event.grad_norm > 0.5 for event in ours.steps_heard())
    for path, low_rank in ours.lora.factors().items():
        # Adam divides by √v: where a gradient is nearly zero its rounding error is enlarged.
        assert_close([low_rank.A, low_rank.B], pairs[path], rel=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_and_padded_agree(family: str) -> None:
    if family == "gemma2":  # cannot be packed: another split of the padded rows instead
        one, other = (Training(ROWS, family, layout=Layout.PADDED, limit=limit) for limit in (2048, 25))
    else:
        one, other = Training(ROWS, family), Training(ROWS, family, layout=Layout.PADDED)
    if family == "gpt2":
        for training in (one, other):
            training.model.apply(lambda module: setattr(module, "p", 0.0) if hasattr(module, "p") else None)
    one.run(), other.run()
    assert [e.loss for e in one.steps_heard()] == pytest.approx([e.loss for e in other.steps_heard()], rel=1e-5)
    assert_close(one.weights(), other.weights(), rel=2e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.PADDED])
def test_micro_batches_change_nothing(dropout: float, layout: Layout) -> None:
    """With dropout too: masks are counted by token, not drawn in the order of computation."""
    whole, split, rows = (Training(ROWS, layout=layout, dropout=dropout, limit=x).run() for x in (2048, 30, 1))
    for other in (split, rows):
        assert [e.loss for e in whole.steps_heard()] == pytest.approx([e.loss for e in other.steps_heard()], rel=1e-5)
        assert_close(whole.weights(), other.weights(), rel=2e-4)


SHARED = branching_rows()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_shared_prefixes_train_the_same_adapter(family: str) -> None:
    one, other = Training(SHARED, family, layout=Layout.TREE), Training(SHARED, family)
    one.run(), other.run()
    assert [e.loss for e in one.steps_heard()] == pytest.approx([e.loss for e in other.steps_heard()], rel=1e-5)
    assert_close(one.weights(), other.weights(), rel=2e-4)
    tokens = [(e.tokens, e.supervised_tokens) for e in other.steps_heard()]
    assert [(e.tokens, e.supervised_tokens) for e in one.steps_heard()] == tokens, "each example is counted whole"
    saved = [o.computed_tokens - e.computed_tokens for e, o in zip(one.steps_heard(), other.steps_heard(), strict=True)]
    assert min(saved) >= 0
    assert max(saved) > 30


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_split_of_a_step_with_shared_prefixes_changes_nothing(dropout: float) -> None:
    """A shared token has one mask, whichever of its rows are computed together."""
    splits = [Training(SHARED, layout=Layout.TREE, dropout=dropout, limit=x).run() for x in (2048, 45, 1)]
    for other in splits[1:]:
        assert [e.loss for e in splits[0].steps_heard()] == pytest.approx(
            [e.loss for e in other.steps_heard()], rel=1e-5
        )
        assert_close(splits[0].weights(), other.weights(), rel=2e-4)
    computed = [sum(e.computed_tokens for e in split.steps_heard()) for split in splits]
    assert computed[0] < computed[1] < computed[2], "the splits differ"


def first_gradients(training: Training) -> tuple[list[torch.Tensor], float]:
    """Of the one step of a training whose B is not zero, before the optimizer sees them; and its loss."""
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for low_rank in training.lora.factors().values():
            low_rank.B.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    training.updater.register_step_pre_hook(
        lambda *_: found.extend(parameter.grad.clone() for parameter in training.lora.parameters())
    )
    (event,) = training.run().steps_heard()
    return found, event.loss


@pytest.mark.parametrize("limit", [2048, 45, 1])
@pytest.mark.parametrize("layout", Layout)
def test_gradients_of_a_step_do_not_depend_on_its_layout(layout: Layout, limit: int) -> None:
    """Against each row alone, padded; before clipping and the optimizer could hide a factor."""

    def gradients(layout: Layout, limit: int) -> tuple[list[torch.Tensor], float]:
        training = Training(SHARED, layout=layout, limit=limit, steps=1, clip=0.0)
        return first_gradients(training)

    (found, loss), (alone, expected) = gradients(layout, limit), gradients(Layout.PADDED, 1)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(found, alone, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layout", Layout)
def test_gradients_of_the_parts_of_a_step_are_those_of_the_step(layout: Layout, dropout: float) -> None:
    """What each of three processes computes, added up; with dropout too, since masks are counted by token."""

    class One(Processes):
        def __init__(self, rank: int, count: int) -> None:
            self.rank, self.count = rank, count

    def gradients(rank: int, count: int) -> tuple[list[torch.Tensor], float]:
        training = Training(SHARED, layout=layout, limit=60, steps=1, clip=0.0, dropout=dropout)
        training.processes = One(rank, count)
        return first_gradients(training)

    whole, loss = gradients(0, 1)
    parts, losses = zip(*(gradients(rank, 3) for rank in range(3)), strict=True)
    assert sum(losses) == pytest.approx(loss, rel=1e-5)
    assert_close([sum(some) for some in zip(*parts, strict=True)], whole, rel=1e-5)


def test_dropout_does_something() -> None:
    plain, dropped = Training(ROWS).run(), Training(ROWS, dropout=0.3).run()
    first, second = plain.steps_heard(), dropped.steps_heard()
    assert first[0].loss == second[0].loss  # B is zero: the first loss cannot see it
    assert abs(first[-1].loss - second[-1].loss) > 1e-4


def test_counts_of_a_step() -> None:
    training = Training(ROWS, layout=Layout.PADDED, steps=1).run()
    rows = [ROWS[i] for i in training.order.step(0)]
    (event,) = training.steps_heard()
    assert event.examples == 4
    assert event.tokens == sum(len(row.ids) for row in rows)
    assert event.computed_tokens == event.tokens - 4
    assert event.supervised_tokens == sum(sum(row.supervised) for row in rows)
    assert event.peak_memory_bytes > 10**7
    assert event.step_seconds > 0


def test_only_the_adapter_changes() -> None:
    training = Training(ROWS)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.run()
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".lora." not in name), name


def test_every_epoch_sees_every_row_once() -> None:
    training = Training(ROWS, steps=6).run()
    seen = [i for number in range(3) for i in training.order.step(number)]
    assert sorted(seen) == list(range(10))
    assert [event.examples for event in training.steps_heard()] == [4, 4, 2, 4, 4, 2]
    assert seen != [i for number in range(3, 6) for i in training.order.step(number)]


def test_no_clipping() -> None:
    clipped, free = Training(ROWS, clip=1e-3).run(), Training(ROWS, clip=0.0).run()
    assert clipped.steps_heard()[0].grad_norm == free.steps_heard()[0].grad_norm  # the norm before clipping
    first = Training(ROWS, clip=1e-3, optimizer="sgd", steps=1, lr=1.0)
    start = first.weights()
    moved = math.sqrt(sum(float((a - b).norm()) ** 2 for a, b in zip(first.run().weights(), start, strict=True)))
    assert moved == pytest.approx(1e-3 * first.schedule.lr(0), rel=1e-3)


# -- validation, stopping ----------------------------------------------------------------------------------------


def test_early_stop_keeps_the_best() -> None:
    losses = iter([3.0, 2.0, 2.5, 2.2, 9.0])
    kept: dict[int, Any] = {}
    training = Training(ROWS, steps=50, eval_every=1, patience=2, evaluate=lambda _: next(losses))
    training.evaluate = lambda _: (kept.update({training.progress.step: training.weights()}), next(losses))[1]
    training.run()
    assert training.progress.stopped_early
    assert training.progress.step == 4
    assert (training.progress.best_step, training.progress.best_val) == (2, 2.0)
    assert_same(training.weights(), kept[2])
    assert [event.kind for event in training.heard if isinstance(event, Noticed)] == ["early stop", "best adapter"]


def test_best_adapter_without_an_early_stop() -> None:
    """The best one is kept also where the steps ran out first; without patience the last one is."""
    for patience, step in ((10, 1), (0, 3)):
        losses = iter([1.0, 2.0, 3.0])
        kept: dict[int, Any] = {}
        training = Training(ROWS, steps=3, eval_every=1, patience=patience)
        training.evaluate = lambda _, t=training, k=kept, x=losses: (k.update({t.progress.step: t.weights()}), next(x))[
            1
        ]
        training.run()
        assert_same(training.weights(), kept[step])


def test_validation_and_saving_rhythm() -> None:
    training = Training(ROWS, steps=7, eval_every=3, save_every=2, evaluate=lambda _: 1.0).run()
    assert [event.step for event in training.heard if isinstance(event, Validated)] == [3, 6, 7]
    assert training.saved == [2, 4, 6, 7]


def test_stop_between_steps() -> None:
    training = Training(ROWS, steps=5).run(until=2)
    assert training.progress.step == 2
    assert not training.progress.ended(training.schedule)


# -- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = loop.summed_loss, iter(range(100))
    monkeypatch.setattr(loop, "summed_loss", lambda *a: real(*a) * (value if next(calls) == 2 else 1.0))
    training = Training(ROWS)
    with pytest.raises(DivergedError, match="step 3: loss"):
        training.run()
    assert len(training.steps_heard()) == 2
    assert all(parameter.grad is None for parameter in training.lora.parameters())
    reference = Training(ROWS)
    monkeypatch.undo()
    assert_same(training.weights(), reference.run(until=2).weights())


def test_gradient_that_is_not_finite() -> None:
    training = Training(ROWS)
    handle = next(iter(training.lora.factors().values())).B.register_hook(lambda g: g * math.nan)
    with pytest.raises(DivergedError, match=r"step 1: loss \d.*gradient norm nan"):
        training.run()
    handle.remove()


def test_weights_that_grew_until_nothing_comes_through() -> None:
    """A step may be so wide that hidden states overflow: finite weights, equal logits, and no gradient ever again."""
    training = Training(ROWS, lr=1e10)
    with pytest.raises(DivergedError, match=r"step 2: loss 5.99146, every one of 400 answers is as likely"):
        training.run()
    assert all(bool(weight.isfinite().all()) for weight in training.weights())
    assert len(training.steps_heard()) == 1
    assert training.saved == []
    assert all(parameter.grad is None for parameter in training.lora.parameters())


@pytest.mark.parametrize(("steps", "save_every"), [(9, 1), (1, None)])
def test_weights_that_grew_too_far_are_not_saved(steps: int, save_every: int | None) -> None:
    """They are seen before they are written, also those of the last step, which no step comes after."""
    training = Training(ROWS, steps=steps, save_every=save_every, lr=1e10, kind="constant")
    with pytest.raises(DivergedError, match=r"step 1: loss 5.99146 after it, every one of 400 answers is as likely"):
        training.run()
    assert len(training.steps_heard()) == 1
    assert training.saved == []
    assert all(parameter.grad is None for parameter in training.lora.parameters())


@pytest.mark.parametrize("save_every", [1, None])
def test_a_loss_far_above_guessing_is_a_divergence(save_every: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are finite. What is kept is what was there before."""
    real = loop.summed_loss
    training = Training(ROWS, save_every=save_every, steps=3)

    def grown(model: Any, batch: Any) -> torch.Tensor:
        bad = not torch.is_grad_enabled() and training.progress.step == 3 and training.lora.active
        return real(model, batch) * (10.0 if bad else 1.0)

    monkeypatch.setattr(loop, "summed_loss", grown)
    with pytest.raises(DivergedError, match=r"step 3: loss \d\d.* after it, more than 10 above that of guessing"):
        training.run()
    assert training.saved == ([1, 2] if save_every else [])
    assert all(parameter.grad is None for parameter in training.lora.parameters())


def test_a_base_that_is_as_far_is_no_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.summed_loss
    monkeypatch.setattr(loop, "summed_loss", lambda *a: real(*a) * 10.0)
    training = Training(ROWS).run()
    assert training.saved == [5]
    assert min(event.loss for event in training.steps_heard()) > 30


def test_a_held_out_loss_far_above_guessing_is_a_divergence() -> None:
    losses = iter([30.0, 5.0, 30.0, 25.0])  # of the adapter, and of the base where that is looked at
    training = Training(ROWS, eval_every=1, evaluate=lambda _: next(losses))
    with pytest.raises(DivergedError, match=r"step 1: held-out loss 30, more than 10 above that of guessing"):
        training.run()
    other = Training(ROWS, steps=1, eval_every=1, evaluate=lambda _: next(losses)).run()
    assert [event.val_loss for event in other.heard if isinstance(event, Validated)] == [30.0]


@pytest.mark.parametrize("choices", [0, 1])
def test_where_answers_vary_a_loss_of_zero_is_no_guess(choices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.training.loops.VOCABULARY", choices)
    real = loop.summed_loss
    monkeypatch.setattr(loop, "summed_loss", lambda m, batch: real(m, batch) * 0)
    assert len(Training(ROWS).run().steps_heard()) == 5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_last_step_has_to_leave_a_loss(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.summed_loss
    monkeypatch.setattr(loop, "summed_loss", lambda *a: real(*a) * (1.0 if torch.is_grad_enabled() else value))
    training = Training(ROWS, steps=2)
    with pytest.raises(DivergedError, match=f"step 2: loss {value:g} after it"):
        training.run()
    assert training.saved == []


def test_a_look_at_the_loss_leaves_the_run_as_it_was() -> None:
    """Its bits are those of a run that saves nothing on its way, with dropout and with a dropout of the base."""
    one, other = (Training(ROWS, family="gpt2", dropout=0.3, save_every=x).run() for x in (1, None))
    assert one.saved == [1, 2, 3, 4, 5]
    assert_same(one.weights(), other.weights())


@pytest.mark.parametrize("loss", [0.0, 1e-9, 2.5, 6.1])
def test_no_gradient_alone_is_no_divergence(loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is learned, to the last bit of fp32; or a step has nothing for the tokens, or the expert, that trains."""
    real = loop.summed_loss
    monkeypatch.setattr(loop, "summed_loss", lambda m, batch: real(m, batch) * 0 + loss * batch.supervised)
    training = Training(ROWS).run()
    assert [event.loss for event in training.steps_heard()] == pytest.approx([loss] * 5)
    assert [event.grad_norm for event in training.steps_heard()] == [0.0] * 5


def test_a_base_that_guesses_is_no_divergence() -> None:
    """A head of zeros gives no gradient and equal logits, whatever the adapter does."""
    training = Training(ROWS, changes={"tie_word_embeddings": False})
    with torch.no_grad():
        training.model.lm_head.weight.zero_()
    training.run()
    assert [event.loss for event in training.steps_heard()] == pytest.approx([math.log(400)] * 5)
    assert [event.grad_norm for event in training.steps_heard()] == [0.0] * 5


@pytest.mark.parametrize("loss", [math.log(400), math.log(400) * (1 + 1e-6)])
def test_the_loss_of_guessing_alone_is_no_divergence(loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gradient there is a way on."""
    real = loop.summed_loss

    def guessing(model: Any, batch: Any) -> torch.Tensor:
        found = real(model, batch)
        return found - found.detach() + loss * batch.supervised

    monkeypatch.setattr(loop, "summed_loss", guessing)
    training = Training(ROWS).run()
    assert all(event.grad_norm > 0 for event in training.steps_heard())


class Memory:
    """Pretends that a micro-batch of more than `most` tokens does not fit, in one of the ways torch says so."""

    def __init__(self, most: int, error: type[BaseException], *, after_backward: bool = False) -> None:
        self.most, self.error, self.after_backward = most, error, after_backward
        self.real, self.failures, self.largest = loop.summed_loss, 0, 0

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        if batch.computed_tokens > self.most:
            self.failures += 1
            if self.after_backward:
                self.real(model, batch).backward()  # leaves gradients of the step that failed
            said = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: 80 TB"
            raise self.error(said)
        self.largest = max(self.largest, batch.computed_tokens)
        return self.real(model, batch)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("after_backward", [False, True])
def test_out_of_memory_halves(
    error: type[BaseException], after_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Training(ROWS, dropout=0.2).run()
    memory = Memory(25, error, after_backward=after_backward)
    monkeypatch.setattr(loop, "summed_loss", memory)
    training = Training(ROWS, dropout=0.2, limit=200).run()
    assert memory.failures > 0
    assert memory.largest <= 25
    assert training.progress.micro_batch_tokens == 25
    noticed = [event for event in training.heard if isinstance(event, Noticed)]
    assert [event.text for event in noticed] == [f"micro-batch halved to {n} tokens" for n in (100, 50, 25)]
    assert all(event.kind == "out of memory" for event in noticed)
    assert [e.loss for e in training.steps_heard()] == pytest.approx(
        [e.loss for e in reference.steps_heard()], rel=1e-5
    )
    assert_close(training.weights(), reference.weights(), rel=2e-4)


def test_out_of_memory_outside_the_gradients_halves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss, and the look at the weights before they are saved."""
    reference = Training(ROWS).run()
    memory, real = Memory(25, torch.OutOfMemoryError), loop.summed_loss
    monkeypatch.setattr(loop, "summed_loss", lambda *a: real(*a) if torch.is_grad_enabled() else memory(*a))
    training = Training(ROWS, limit=200, eval_every=2)
    seen: list[int] = []

    def evaluate(limit: int) -> float:
        seen.append(limit)
        if limit > 100:
            raise torch.OutOfMemoryError("planted")
        return 1.0

    training.evaluate = evaluate
    training.run()
    assert seen == [200, 100, 100, 100]
    assert (training.progress.micro_batch_tokens, training.saved) == (25, [5])
    assert [event.text for event in training.heard if isinstance(event, Noticed)] == [
        f"micro-batch halved to {n} tokens" for n in (100, 50, 25)
    ]
    assert_close(training.weights(), reference.weights(), rel=2e-4)


def test_no_room_for_one_row_outside_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.summed_loss
    monkeypatch.setattr(loop, "summed_loss", lambda *a: real(*a) if torch.is_grad_enabled() else full())

    def full() -> torch.Tensor:
        raise torch.OutOfMemoryError("planted")

    training = Training(ROWS)
    with pytest.raises(OutOfMemoryError, match="one row at a time"):
        training.run()
    assert training.saved == []


def test_one_row_too_big(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "summed_loss", Memory(10, RuntimeError))
    training = Training(ROWS, limit=200)
    with pytest.raises(OutOfMemoryError, match="one row at a time"):
        training.run()
    assert all(parameter.grad is None for parameter in training.lora.parameters())
    # Rows that stand alone already are not tried again with ever smaller limits.
    assert training.progress.micro_batch_tokens == 12


def test_other_errors_are_not_taken_for_a_full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "summed_loss", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        Training(ROWS).run()


def test_each_step_draws_its_own_masks() -> None:
    """One row, one token order, weights that do not move: only the masks can change the loss from step to step."""
    training = Training(rows_of(24), steps=3, dropout=0.5, lr=1e-30)
    with torch.no_grad():
        for low_rank in training.lora.factors().values():
            low_rank.B.normal_()  # with B zero no mask would show
    training.run()
    assert len({event.loss for event in training.steps_heard()}) == 3
