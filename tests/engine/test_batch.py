"""Rows with adapters of their own, continued together: what each gives alone, whoever joins and leaves beside it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import loratune as lt
from loratune.engine.batch import Chosen, Engine, Limits, Request
from loratune.engine.choose import Sampling
from loratune.errors import AdapterStateError, DataError
from loratune.model import why_not_packed
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


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_what_it_gives_alone(family: str) -> None:
    """More rows than slots, of all adapters and the base, so that they join where others left."""
    model, handle = adapted(family)
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
    with pytest.raises(AdapterStateError, match="no adapter 'z'") as caught:
        engine.submit(Request((5,), NEVER, adapter="z"))
    assert caught.value.hint == "loaded: a, b, c"
    handle.add(lt.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "dora")
    with pytest.raises(AdapterStateError, match="DoRA"):
        engine.refresh()


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
