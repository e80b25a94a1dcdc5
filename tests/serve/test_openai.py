"""The real `openai` client against a real server: what it answers is what the model gives alone."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import httpx
import openai
import pytest
import torch

import loratune as lt
from tests.models import tiny
from tests.oracle.decoding import greedy
from tests.serve.conftest import NAMES, Server, Shelf
from tests.tiny import tiny_tokenizer

BASE = "tiny-llama"
TOKENIZER = tiny_tokenizer()
QUESTIONS = ["What is a bridge?", "2 + 3 =", "Name three rivers, and say where they end.", "hello"]


@pytest.fixture(scope="module")
def alone(shelf: Shelf) -> Any:
    """The greedy answer of one model by itself: `alone(name, prompt ids, count)`."""
    model = tiny("llama")
    handle = lt.attach(model, shelf.adapters / "a", name="a")
    for name in (*NAMES, "late"):
        if name != "a":
            handle.load(shelf.adapters / name, name)

    @cache
    def found(name: str, prompt: tuple[int, ...], count: int) -> tuple[str, int, bool]:
        handle.activate(*([] if name == BASE else [name]))
        ids, stopped = greedy(model, list(prompt), stops(), count)
        return TOKENIZER.decode(ids, skip_special_tokens=True), len(ids), stopped

    return found


def stops() -> frozenset[int]:
    return frozenset({1})  # <|im_end|>


def chat_ids(question: str, system: str | None = None) -> tuple[int, ...]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def ask(server: Server, model: str, question: str, count: int = 12, **how: Any) -> Any:
    return server.openai.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=count,
        **{"temperature": 0.0, **how},
    )


def test_models(server: Server) -> None:
    listed = server.openai.models.list().data
    assert [one.id for one in listed][:1] == [BASE]
    assert {one.id for one in listed} >= {BASE, *NAMES}
    assert {one.model_extra["parent"] for one in listed} == {None, BASE}  # type: ignore[index]
    assert server.openai.models.retrieve("b").id == "b"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("nobody")


def test_many_at_once_are_each_what_they_are_alone(server: Server, alone: Any) -> None:
    asked = [(name, question) for question in QUESTIONS for name in (*NAMES, BASE)] * 2
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda one: ask(server, *one), asked))
    for (name, question), answer in zip(asked, answers, strict=True):
        ids = chat_ids(question)
        text, tokens, stopped = alone(name, ids, 12)
        (choice,) = answer.choices
        assert choice.message.content == text
        assert choice.message.role == "assistant"
        assert choice.finish_reason == ("stop" if stopped else "length")
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.completion_tokens == tokens + stopped
        assert answer.model == name


def test_a_stream_is_the_whole_answer_in_pieces(server: Server) -> None:
    whole = ask(server, "b", QUESTIONS[0], 20)
    chunks = list(ask(server, "b", QUESTIONS[0], 20, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends == [None] * (len(ends) - 1) + [whole.choices[0].finish_reason]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert not any(chunk.usage for chunk in ask(server, "b", QUESTIONS[0], 3, stream=True))


def test_completions_of_text_and_of_ids(server: Server, alone: Any) -> None:
    client = server.openai
    prompts = ["Once upon a time", "The river"]
    ids = [tuple(TOKENIZER(prompt)["input_ids"]) for prompt in prompts]
    expected = [alone("c", one, 8)[0] for one in ids]
    several = client.completions.create(model="c", prompt=prompts, max_tokens=8, temperature=0)
    assert [choice.text for choice in several.choices] == expected
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.usage is not None
    assert several.usage.prompt_tokens == sum(map(len, ids))
    by_ids = client.completions.create(model="c", prompt=[list(one) for one in ids], max_tokens=8, temperature=0)
    assert [choice.text for choice in by_ids.choices] == expected
    one = client.completions.create(model="c", prompt=list(ids[0]), max_tokens=8, temperature=0)
    assert [choice.text for choice in one.choices] == expected[:1]
    streamed = ["", ""]
    for chunk in client.completions.create(model="c", prompt=prompts, max_tokens=8, temperature=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_stop_sequences(server: Server) -> None:
    whole = ask(server, "a", QUESTIONS[2], 40).choices[0].message.content
    assert len(whole) > 12
    stop = whole[7:10]
    end = whole.index(stop)
    for stream in (False, True):
        found = ask(server, "a", QUESTIONS[2], 40, stop=["never there", stop], stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in found if chunk.choices]
            text, finish = "".join(choice.delta.content or "" for choice in chunks), chunks[-1].finish_reason
        else:
            text, finish = found.choices[0].message.content, found.choices[0].finish_reason
        assert text == whole[:end]
        assert finish == "stop"


def test_probabilities(server: Server, shelf: Shelf) -> None:
    answer = ask(server, "a", QUESTIONS[0], 5, logprobs=True, top_logprobs=2)
    model = tiny("llama")
    lt.attach(model, shelf.adapters / "a")
    prompt = chat_ids(QUESTIONS[0])
    ids, _ = greedy(model, list(prompt), stops(), 5)
    with torch.no_grad():
        logs = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    for place, token in enumerate(ids):
        one = answer.choices[0].logprobs.content[place]
        assert one.token == TOKENIZER.decode([token])
        assert one.logprob == pytest.approx(float(logs[len(prompt) - 1 + place, token]), abs=1e-3)
        assert one.top_logprobs[0].logprob == pytest.approx(one.logprob, abs=1e-4)
        assert len(one.top_logprobs) == 2
    plain = server.openai.completions.create(model="a", prompt="x", max_tokens=3, temperature=0, logprobs=2)
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.tokens or ()) == 3
    assert all(len(likeliest) <= 2 for likeliest in plain.choices[0].logprobs.top_logprobs or ())


def test_a_seed_gives_one_answer(server: Server) -> None:
    def drawn(seed: int) -> str:
        answer = ask(server, "a", QUESTIONS[0], 16, temperature=1.0, top_p=0.9, seed=seed)
        return str(answer.choices[0].message.content)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert ask(server, "a", QUESTIONS[0], 16, temperature=1.0).choices[0].message.content is not None


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "nobody"}, 404, "there are tiny-llama, a, b, c"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": 3, "top_p": 0, "n": 2}, 400, "temperature: .*top_p: .*n: "),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"maxtokens": 5}, 400, "maxtokens: Extra inputs"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "long " * 400}]}, 400, "a row at most 128"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(server: Server, body: dict[str, Any], status: int, words: str) -> None:
    asked = {"model": "a", "messages": [{"role": "user", "content": "hi"}], **body}
    found = server.http.post("/v1/chat/completions", json=asked)
    assert found.status_code == status
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    import re

    assert re.search(words, error["message"])


def test_bodies_that_are_none(server: Server) -> None:
    for content in (b"", b"{", b"[1, 2]", b"\xff\xfe", b'{"model": "a"}', b"null"):
        found = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert found.status_code == 400, content
        assert found.json()["error"]["message"]
    large = server.http.post("/v1/completions", content=b" " * (5 << 20))
    assert large.status_code == 413
    assert "more than 4,194,304 bytes" in large.json()["error"]["message"]

    def endless() -> Any:
        for _ in range(80):
            yield b" " * (1 << 16)

    assert server.http.post("/v1/completions", content=endless()).status_code == 413
    assert server.http.get("/v1/nothing").status_code == 404


def test_tokens_that_there_are_not(server: Server) -> None:
    found = server.http.post("/v1/completions", json={"model": "a", "prompt": [5, 99999], "max_tokens": 2})
    assert found.status_code == 400
    assert "no token has the number 99999" in found.json()["error"]["message"]
    for prompt in ([], "", [[]]):
        assert server.http.post("/v1/completions", json={"model": "a", "prompt": prompt}).status_code == 400


def running(server: Server) -> dict[str, float]:
    lines = server.http.get("/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line and not line.startswith("#")}


def wait_until(true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_who_leaves_frees_a_slot(slow: Server, stream: bool) -> None:
    body = {"model": "a", "prompt": "hi", "max_tokens": 100, "ignore_eos": True, "stream": stream}
    before = running(slow)
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=httpx.Timeout(10, read=2)) as client:
        if stream:
            with client.stream("POST", f"{slow.url}/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                assert running(slow)["loratune_running"] == 1
        else:
            left = pool.submit(client.post, f"{slow.url}/v1/completions", json=body)
            wait_until(lambda: running(slow)["loratune_running"] == 1, 2)
            assert isinstance(left.exception(), httpx.ReadTimeout)
    wait_until(lambda: running(slow)["loratune_running"] == 0, 5)
    after = running(slow)
    assert after["loratune_requests_total"] == before["loratune_requests_total"] + 1
    assert after["loratune_generated_tokens_total"] < before["loratune_generated_tokens_total"] + 30


def test_what_is_counted(server: Server) -> None:
    before = running(server)
    answer = ask(server, "a", "count me", 4)
    after = running(server)
    assert after["loratune_requests_total"] == before["loratune_requests_total"] + 1
    written = after["loratune_generated_tokens_total"] - before["loratune_generated_tokens_total"]
    assert written == answer.usage.completion_tokens
    name = "loratune_time_to_first_token_seconds_count"
    assert after[name] == before[name] + 1
    assert after["loratune_failed"] == 0
    assert server.http.get("/health").json() == {"status": "ok"}
