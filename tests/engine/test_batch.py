"""Rows with adapters of their own, continued together: what each gives alone, whoever joins and leaves beside it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import loratune as lt
from loratune.engine.batch import Chosen, Engine, Limits, Request
from loratune.engine.choose import Sampling
from loratune.errors import AdapterStateError, DataError, OutOfMemoryError
from loratune.model import attention, fuse, why_not_packed
from tests.models import VOCABULARY, tiny

FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "mixtral", "phi3", "gpt2"]
NAMES = ("a", "b", "c")
NEVER = frozenset({VOCABULARY})


def adapted(family: str = "llama") -> tuple[Any, lt.Adapters]:
    """Three adapters of other ranks, scales and starts."""
    model = tiny(family)
    assert why_not_packed(model) is None
    torch.manual_seed(0)
    config: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False}
    handle = lt.attach(model, lt.LoraConfig(r=4, **config), name="a")
    handle.add(lt.LoraConfig(r=2, lora_alpha=3, use_rslora=True, **config), "b")
    handle.add(lt.LoraConfig(r=3, target_modules="all-linear", init_lora_weights="pissa"), "c")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, handle


def prompts(count: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    dice = random.Random(seed)
    return [tuple(dice.randrange(3, VOCABULARY) for _ in range(dice.randrange(1, 30))) for _ in range(count)]


def greedy(model: Any, handle: lt.Adapters, name: str | None, prompt: tuple[int, ...], count: int) -> list[int]:
    """By whole passes over all tokens so far, without a cache."""
    handle.activate(*([] if name is None else [name]))
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def run(engine: Engine, answers: dict[int, list[Chosen]] | None = None) -> dict[int, list[Chosen]]:
    answers = {} if answers is None else answers
    while engine.running or engine.waiting:
        for chosen in engine.step():
            answers.setdefault(chosen.ticket, []).append(chosen)
    return answers


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_what_it_gives_alone(family: str, fused: bool) -> None:
    """More rows than slots, of all adapters and the base, so that they join where others left."""
    model, handle = adapted(family)
    if fused and not fuse(model):
        pytest.skip("nothing to fuse")
    engine = Engine(model, handle, Limits(slots=4, prompt_tokens=40))
    asked = list(zip(prompts(11), (*NAMES, None) * 3, (9, 2, 14, 5, 1, 8, 3, 12, 6, 4, 7), strict=False))
    tickets = [
        engine.submit(Request(prompt, NEVER, Sampling(max_new_tokens=count), adapter=name))
        for prompt, name, count in asked
    ]
    answers = run(engine)
    for ticket, (prompt, name, count) in zip(tickets, asked, strict=True):
        found = [chosen.token for chosen in answers[ticket]]
        assert found == greedy(model, handle, name, prompt, count)
        assert [chosen.finish for chosen in answers[ticket]] == [None] * (count - 1) + ["length"]


def test_a_row_that_outgrows_its_slot_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.engine.slots._SHORTEST", 8)
    model, handle = adapted()
    engine = Engine(model, handle, Limits(slots=2))
    asked = [(prompts(1, seed=1)[0], "a", 40), (prompts(1, seed=2)[0], None, 70)]
    tickets = [engine.submit(Request(p, NEVER, Sampling(max_new_tokens=c), adapter=n)) for p, n, c in asked]
    answers = run(engine)
    for ticket, (prompt, name, count) in zip(tickets, asked, strict=True):
        assert [chosen.token for chosen in answers[ticket]] == greedy(model, handle, name, prompt, count)


def test_stop_tokens_and_the_models_context_end_an_answer() -> None:
    model, handle = adapted()
    engine = Engine(model, handle, Limits(longest=24))
    prompt = prompts(1)[0][:6]
    third = greedy(model, handle, "a", prompt, 3)[2]
    stopped = engine.submit(Request(prompt, frozenset({third}), adapter="a"))
    long = engine.submit(Request(prompt, NEVER, adapter="b"))
    answers = run(engine)
    assert answers[stopped][-1].token == third
    assert answers[stopped][-1].finish == "stop"
    assert len(answers[stopped]) <= 3
    assert len(answers[long]) == 24 - 6
    assert answers[long][-1].finish == "length"


def test_probabilities_are_the_models() -> None:
    model, handle = adapted()
    engine = Engine(model, handle)
    prompt = prompts(1)[0]
    ticket = engine.submit(Request(prompt, NEVER, Sampling(4, temperature=0.7, seed=3), "b", alternatives=3))
    engine.submit(Request(prompts(2)[1], NEVER, Sampling(4), "a"))
    answer = run(engine)[ticket]
    ids = [*prompt, *(chosen.token for chosen in answer)]
    handle.activate("b")
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    for place, chosen in enumerate(answer, len(prompt) - 1):
        assert chosen.logprob == pytest.approx(float(logs[place, chosen.token]), abs=1e-4)
        values, tokens = logs[place].topk(3)
        assert [token for token, _ in chosen.likeliest] == tokens.tolist()
        assert [value for _, value in chosen.likeliest] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_seed_gives_one_answer_whoever_is_beside_it() -> None:
    model, handle = adapted()
    request = Request(prompts(1)[0], NEVER, Sampling(12, temperature=1.3, top_p=0.8, seed=5), "a")
    lone = Engine(model, handle)
    ticket = lone.submit(request)
    expected = [chosen.token for chosen in run(lone)[ticket]]
    busy = Engine(model, handle, Limits(slots=3))
    for prompt in prompts(5, seed=7):
        busy.submit(Request(prompt, NEVER, Sampling(9, temperature=0.9, seed=1), "c"))
    ticket = busy.submit(request)
    assert [chosen.token for chosen in run(busy)[ticket]] == expected
    assert len(set(expected)) > 3


def test_sampling_draws_from_the_distribution() -> None:
    model, handle = adapted()
    prompt = prompts(1)[0]
    handle.activate("a")
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1] / 2.0).softmax(-1)
    engine = Engine(model, handle, Limits(slots=64))
    draws = 3000
    for seed in range(draws):
        engine.submit(Request(prompt, NEVER, Sampling(1, temperature=2.0, seed=seed), "a"))
    counts = torch.zeros(VOCABULARY)
    for answer in run(engine).values():
        counts[answer[0].token] += 1
    likely = p.topk(8).indices
    spread = (draws * p * (1 - p)).sqrt()
    assert ((counts - draws * p).abs() < 4.5 * spread + 1)[likely].all()
    # And of the likeliest half only those.
    order = p.sort(descending=True).indices
    kept = set(order[: int((p[order].cumsum(-1) < 0.5).sum()) + 1].tolist())
    for seed in range(300):
        engine.submit(Request(prompt, NEVER, Sampling(1, temperature=2.0, top_p=0.5, seed=seed), "a"))
    drawn = {answer[0].token for answer in run(engine).values()}
    assert drawn <= kept
    assert len(drawn) > 1


def test_who_is_cancelled_frees_a_slot_and_disturbs_nobody() -> None:
    model, handle = adapted()
    engine = Engine(model, handle, Limits(slots=3))
    asked = [(prompt, name, 10) for prompt, name in zip(prompts(5), ("a", "b", None, "c", "a"), strict=True)]
    tickets = [engine.submit(Request(p, NEVER, Sampling(c), n)) for p, n, c in asked]
    answers: dict[int, list[Chosen]] = {}
    for _ in range(3):
        for chosen in engine.step():
            answers.setdefault(chosen.ticket, []).append(chosen)
    engine.cancel(tickets[0])
    engine.cancel(tickets[4])
    assert (engine.running, engine.waiting) == (2, 1)
    engine.cancel(12345)
    run(engine, answers)
    for ticket, (prompt, name, count) in list(zip(tickets, asked, strict=True))[1:4]:
        assert [chosen.token for chosen in answers[ticket]] == greedy(model, handle, name, prompt, count)
    assert tickets[4] not in answers


def test_adapters_come_and_go_while_others_are_continued() -> None:
    model, handle = adapted()
    engine = Engine(model, handle)
    prompt = prompts(1)[0]
    ticket = engine.submit(Request(prompt, NEVER, Sampling(12), "a"))
    answers: dict[int, list[Chosen]] = {ticket: engine.step()}
    handle.add(lt.LoraConfig(r=5, target_modules="all-linear", init_lora_weights=False), "late")
    with pytest.raises(AdapterStateError, match="no adapter 'late'"):
        engine.submit(Request(prompt, NEVER, adapter="late"))
    engine.refresh()
    late = engine.submit(Request(prompt, NEVER, Sampling(5), "late"))
    assert engine.uses("a")
    assert engine.uses("late")
    assert not engine.uses("b")
    engine.step()
    handle.remove("b")
    engine.refresh()
    answers = run(engine, {})
    assert engine.adapters == ("a", "c", "late")
    assert [c.token for c in answers[late]] == greedy(model, handle, "late", prompt, 5)[-len(answers[late]) :]
    assert [c.token for c in answers[ticket]] == greedy(model, handle, "a", prompt, 12)[-len(answers[ticket]) :]


def test_what_cannot_be_asked() -> None:
    model, handle = adapted()
    engine = Engine(model, handle, Limits(longest=16))
    with pytest.raises(DataError, match="empty"):
        engine.submit(Request((), NEVER))
    with pytest.raises(DataError, match="16 tokens, and a row at most 16"):
        engine.submit(Request(tuple(range(16)), NEVER))
    for token in (-1, VOCABULARY):
        with pytest.raises(DataError, match=f"a token {token}, and the model those from 0 to 399"):
            engine.submit(Request((5, token, 6), NEVER))
    assert not engine.busy
    with pytest.raises(AdapterStateError, match="no adapter 'z'") as caught:
        engine.submit(Request((5,), NEVER, adapter="z"))
    assert caught.value.hint == "loaded: a, b, c"
    handle.add(lt.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "dora")
    with pytest.raises(AdapterStateError, match="DoRA"):
        engine.refresh()


def test_more_alternatives_than_tokens() -> None:
    """Of tokens that the model forbids, no log of their probability 0 is told."""
    model = tiny()
    assert why_not_packed(model) is None
    engine = Engine(model)
    model.lm_head.register_forward_hook(lambda *call: call[-1].index_fill(-1, torch.arange(7), -torch.inf))
    ticket = engine.submit(Request(prompts(1)[0], NEVER, Sampling(1), alternatives=1000))
    (chosen,) = run(engine)[ticket]
    assert chosen.finish == "length"
    assert sorted(token for token, _ in chosen.likeliest) == list(range(7, VOCABULARY))


def test_a_model_that_breaks_says_so() -> None:
    model, handle = adapted()
    engine = Engine(model, handle)
    with torch.no_grad():
        handle.factors("b")["model.layers.1.mlp.down_proj"].A.fill_(1e38)
    engine.refresh()
    broken = engine.submit(Request(prompts(1)[0], NEVER, Sampling(5), "b"))
    sound = engine.submit(Request(prompts(2)[1], NEVER, Sampling(5), "a"))
    answers = run(engine)
    assert [chosen.finish for chosen in answers[broken]] == ["broken"]
    assert [c.token for c in answers[sound]] == greedy(model, handle, "a", prompts(2)[1], 5)
    with torch.no_grad():
        handle.factors("b")["model.layers.0.mlp.down_proj"].B[0, 0] = torch.nan
    with pytest.raises(AdapterStateError, match=r"'b' holds NaN or infinity: model.layers.0.mlp.down_proj"):
        engine.refresh()


def test_the_active_adapters_without_names() -> None:
    model, handle = adapted()
    handle.activate("c")
    engine = Engine(model)
    prompt = prompts(1)[0]
    ticket = engine.submit(Request(prompt, NEVER, Sampling(6)))
    answer = run(engine)[ticket]
    assert [chosen.token for chosen in answer] == greedy(model, handle, "c", prompt, 6)


POISON = VOCABULARY - 1


def poisoned(where: str, token: int = POISON, *, layers: int = 3) -> tuple[Any, list[bool]]:
    """A model in whose middle layer a token has NaN, as long as the list holds True."""
    model = tiny(num_hidden_layers=layers)
    assert why_not_packed(model) is None
    ids, active = list[torch.Tensor](), [False]
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: ids.append(args[0]))

    def poison(*call: Any) -> torch.Tensor:
        output: torch.Tensor = call[-1]
        return output.masked_fill((ids[-1] == token)[..., None], torch.nan) if active[0] else output

    model.get_submodule(where).register_forward_hook(poison)
    return model, active


def alone(model: Any, prompt: tuple[int, ...], sampling: Sampling) -> list[int]:
    engine = Engine(model)
    ticket = engine.submit(Request(prompt, NEVER, sampling))
    return [chosen.token for chosen in run(engine)[ticket]]


WAYS = [
    Sampling(8),
    Sampling(8, temperature=1.0, seed=4),
    Sampling(8, temperature=1.0, top_p=0.9, seed=4),
]
# Of whole layers, and of what the next row would read of the slot.
POISONED = ["model.layers.1", "model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", POISONED)
def test_a_row_that_breaks_in_its_prompt_disturbs_nobody(where: str, way: Sampling) -> None:
    model, active = poisoned(where)
    long, short = tuple(range(3, 38)), (9, 8, 7)
    expected = alone(model, long, way), alone(model, short, way)
    active[0] = True
    engine = Engine(model, limits=Limits(slots=2))
    beside = engine.submit(Request(long, NEVER, way))
    broken = engine.submit(Request((*range(3, 32), POISON), NEVER, way))
    after = engine.submit(Request(short, NEVER, way))  # in the slot of the broken one, while the long one goes on
    answers = run(engine)
    assert [chosen.finish for chosen in answers[broken]] == ["broken"]
    assert [chosen.token for chosen in answers[beside]] == expected[0]
    assert [chosen.token for chosen in answers[after]] == expected[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", POISONED)
def test_a_row_that_breaks_in_its_answer_disturbs_nobody(where: str, way: Sampling) -> None:
    long, first, short = tuple(range(100, 140)), tuple(range(3, 32)), (9, 8, 7)
    model, _ = poisoned(where)
    beside, answer, after = (alone(model, prompt, way) for prompt in (long, first, short))
    others = {*long, *first, *short, *beside, *after}
    at = next(i for i, token in enumerate(answer) if token not in others)
    model, active = poisoned(where, answer[at])
    active[0] = True
    engine = Engine(model, limits=Limits(slots=2))
    tickets = [engine.submit(Request(prompt, NEVER, way)) for prompt in (long, first, short)]
    found = run(engine)
    assert [chosen.finish for chosen in found[tickets[1]]] == [None] * (at + 1) + ["broken"]
    assert [chosen.token for chosen in found[tickets[0]]] == beside
    assert [chosen.token for chosen in found[tickets[2]]] == after


def test_a_kernel_that_goes_by_blocks_spreads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that multiplies what a mask hides by zero, as kernels for GPUs do in blocks that are seen in part."""

    def dense(module: Any, query: Any, key: Any, value: Any, *args: Any, segments: Any = None, **kwargs: Any) -> Any:
        if segments is None:
            return honest(module, query, key, value, *args, segments=segments, **kwargs)
        step = kwargs.pop("step", None)
        if step is not None:
            first = [t[:, :, : step.rows] for t in (query, key, value)]
            behind = [t[:, :, step.rows :] for t in (query, key, value)]
            parts = (
                honest(module, *first, *args, step=step, **kwargs),
                dense(module, *behind, *args, segments=segments, **kwargs),
            )
            return torch.cat([part for part, _ in parts], 1), None
        row = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))
        seen = (row[:, None] == row) & torch.ones(len(row), len(row), dtype=torch.bool).tril()
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = (query @ key.mT * kwargs["scaling"]).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    honest = attention.packed_attention
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, dense)
    model, active = poisoned(POISONED[1])
    asked = [((5, POISON), Sampling(6)), ((9, 8, 7), Sampling(6)), ((11, 12), WAYS[2]), ((POISON,), WAYS[2])]
    expected = [alone(model, *one) for one in asked[1:3]]
    active[0] = True
    engine = Engine(model)
    tickets = [engine.submit(Request(prompt, NEVER, way)) for prompt, way in asked]
    answers = run(engine)
    assert [[chosen.token for chosen in answers[ticket]] for ticket in tickets[1:3]] == expected
    assert [answers[tickets[i]][-1].finish for i in (0, 3)] == ["broken", "broken"]


def test_what_a_window_hid_reaches_nobody() -> None:
    """A row whose answer is one token may leave NaN that nothing of its own has seen."""
    model = tiny("mistral", sliding_window=4, num_hidden_layers=1, max_position_embeddings=2000)
    assert why_not_packed(model) is None
    ids, active = list[torch.Tensor](), [False]
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: ids.append(args[0]))
    model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda *call: call[-1].masked_fill((ids[-1] == POISON)[..., None] & torch.tensor(active), torch.inf)
    )
    long, short = tuple(range(3, 38)), (9, 8, 7)
    expected = alone(model, short, Sampling(8))
    active[0] = True
    engine = Engine(model, limits=Limits(slots=2))
    engine.submit(Request(long, NEVER, Sampling(20)))
    one = engine.submit(Request((*range(3, 20), POISON, *range(3, 390), *range(3, 390)), NEVER, Sampling(1)))
    after = engine.submit(Request(short, NEVER, Sampling(8)))
    answers = run(engine)
    assert [chosen.finish for chosen in answers[one]] == ["length"]
    assert [chosen.token for chosen in answers[after]] == expected


@pytest.mark.parametrize("fails_at", range(6))
def test_a_slot_that_cannot_grow_loses_nothing(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory ends in any layer, of keys or values; the step can be tried again when there is some."""
    monkeypatch.setattr("loratune.engine.slots._SHORTEST", 16)
    model = tiny(num_hidden_layers=3)
    assert why_not_packed(model) is None
    long, joining = (tuple(range(3, 14)), 30), (tuple(range(5, 45)), 5)
    expected = [alone(model, prompt, Sampling(count)) for prompt, count in (long, joining)]
    engine = Engine(model, limits=Limits(slots=2))
    tickets = [engine.submit(Request(long[0], NEVER, Sampling(long[1])))]
    answers: dict[int, list[Chosen]] = {}
    honest, left, failures = torch.Tensor.new_zeros, [fails_at], 0

    def scarce(tensor: torch.Tensor, *shape: Any, **how: Any) -> torch.Tensor:
        if left[0] == 0:
            raise torch.OutOfMemoryError("planted")
        left[0] -= 1
        return honest(tensor, *shape, **how)

    def step() -> bool:
        try:
            told = engine.step()
        except torch.OutOfMemoryError:
            return False
        for chosen in told:
            answers.setdefault(chosen.ticket, []).append(chosen)
        return True

    while engine.busy:
        if len(answers.get(tickets[0], ())) == 20 and len(tickets) == 1:
            tickets.append(engine.submit(Request(joining[0], NEVER, Sampling(joining[1]))))
        if engine.running:
            left[0] = fails_at
            monkeypatch.setattr(torch.Tensor, "new_zeros", scarce)
        if not step():
            failures += 1
            monkeypatch.setattr(torch.Tensor, "new_zeros", honest)
            assert step()
    assert [[chosen.token for chosen in answers[ticket]] for ticket in tickets] == expected
    assert failures == 2


def test_after_a_failed_pass_the_rows_go_on_or_are_cancelled() -> None:
    model, _ = poisoned(POISONED[0])
    failing = [False]

    def fail(*_: Any) -> None:
        if failing[0]:
            raise RuntimeError("planted")

    model.model.layers[2].register_forward_hook(fail)
    asked = [(9, 8, 7), (5, 6), tuple(range(20, 50))]
    expected = [alone(model, prompt, Sampling(6)) for prompt in asked]
    engine = Engine(model, limits=Limits(slots=3))
    tickets = [engine.submit(Request(prompt, NEVER, Sampling(6))) for prompt in asked[:2]]
    engine.step()
    failing[0] = True
    tickets.append(engine.submit(Request(asked[2], NEVER, Sampling(6))))
    with pytest.raises(RuntimeError, match="planted"):
        engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    failing[0] = False
    engine.cancel(tickets[0])
    found = run(engine)
    assert [chosen.token for chosen in found[tickets[1]]] == expected[1][-len(found[tickets[1]]) :]
    assert [chosen.token for chosen in found[tickets[2]]] == expected[2]
    assert tickets[0] not in found


def test_the_slot_of_a_cancelled_row_serves_the_next_one() -> None:
    model, handle = adapted()
    engine = Engine(model, handle, Limits(slots=2))
    first, second, third = (tuple(range(3, 40)), "a", 20), (tuple(range(60, 101)), "b", 20), ((7, 8), "c", 15)
    tickets = [engine.submit(Request(p, NEVER, Sampling(c), n)) for p, n, c in (first, second, third)]
    answers: dict[int, list[Chosen]] = {}
    for _ in range(4):
        for chosen in engine.step():
            answers.setdefault(chosen.ticket, []).append(chosen)
    assert tickets[2] not in answers
    engine.cancel(tickets[0])
    assert (engine.running, engine.waiting) == (1, 1)
    for chosen in engine.step():
        answers.setdefault(chosen.ticket, []).append(chosen)
    assert (engine.running, engine.waiting) == (2, 0)
    run(engine, answers)
    for ticket, (prompt, name, count) in zip(tickets[1:], (second, third), strict=True):
        assert [chosen.token for chosen in answers[ticket]] == greedy(model, handle, name, prompt, count)
    assert len(answers[tickets[0]]) < 10


def test_rows_are_as_long_as_memory_allows(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(max_position_embeddings=2000)
    assert why_not_packed(model) is None
    place = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, bytes
    monkeypatch.setattr("loratune.engine.trial.available_memory", lambda _: int(4 * 500 * place / 0.8) + 1)
    assert Engine(model, limits=Limits(slots=4, longest=500)).longest == 500
    assert not caplog.messages
    assert Engine(model, limits=Limits(slots=4)).longest == 500
    assert caplog.messages == ["a row has 500 tokens at most, not 2000: memory holds no more in 4 slots"]
    with pytest.raises(OutOfMemoryError, match="memory holds 250 tokens in each of 8 slots") as caught:
        Engine(model, limits=Limits(slots=8))
    assert "fewer slots" in caught.value.hint
    assert Engine(model, limits=Limits(slots=8, longest=250)).longest == 250
    others = int(4 * 200 * place / 0.8)
    assert Engine(model, limits=Limits(slots=4, reserved=others)).longest == 300
    with pytest.raises(OutOfMemoryError, match="memory holds 0 tokens"):
        Engine(model, limits=Limits(slots=4, reserved=10 * others))


def test_an_adapter_in_the_place_of_another_is_the_one_that_answers() -> None:
    """Alone among several for many tokens, so that what is multiplied is narrowed to it, before and after."""
    model, handle = adapted()
    engine, prompt = Engine(model, handle), prompts(1)[0]
    answers = []
    for name in ("c", "d", "e"):
        if name not in handle.names:
            handle.activate()
            handle.remove(handle.names[-1])
            alpha = 8 if name == "d" else 40
            config = lt.LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
            handle.add(config, name)
            engine.refresh()
        assert handle.names.index(name) == 2
        ticket = engine.submit(Request(prompt, NEVER, Sampling(max_new_tokens=9), adapter=name))
        answers.append([chosen.token for chosen in run(engine)[ticket]])
        assert answers[-1] == greedy(model, handle, name, prompt, 9)
    assert answers[1] != answers[2]


@pytest.mark.parametrize("where", ["bias", "start"])
def test_whoever_is_not_finite_is_named(where: str) -> None:
    """Where its bias overflows in the base's dtype, and where the start that it is counted from holds NaN."""
    model = tiny().half() if where == "bias" else tiny()
    assert why_not_packed(model) is None
    init: Any = "olora" if where == "start" else False
    config = lt.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=where == "bias", init_lora_weights=init)
    handle = lt.attach(model, config, name="a")
    with torch.no_grad():
        layer = model.model.layers[1].self_attn.q_proj
        if where == "bias":
            next(p for name, p in layer.named_parameters() if name.endswith("a.bias")).fill_(60_000.0)
        else:
            next(b for name, b in layer.named_buffers()).fill_(torch.nan)
    with pytest.raises(AdapterStateError, match=r"'a' holds NaN or infinity: model.layers.1.self_attn.q_proj"):
        handle.mixed("a")
