"""What OpenAI's clients send: what is legal there is taken here, or refused where it would change the answer."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from loratune.engine.text import Text
from loratune.serve.wire import ChatBody
from tests.serve.conftest import Shelf, asked_here, service

CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "a", "prompt": "hi", "max_tokens": 2}


@pytest.fixture(scope="module")
def client(shelf: Shelf) -> Iterator[httpx.Client]:
    with asked_here(service(shelf, "a", slots=2, queue=3)) as found:
        yield found


def said(client: httpx.Client, body: dict[str, Any], fields: dict[str, Any]) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return client.post(path, json={**body, **fields})


BOTH = ("temperature", "top_p", "stream", "stream_options", "n", "seed", "stop", "user", "metadata", "store")
BOTH += ("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "ignore_eos")


@pytest.mark.parametrize("field", [*BOTH, "max_completion_tokens", "response_format", "tools", "tool_choice"])
def test_null_is_the_same_as_nothing_in_a_chat(client: httpx.Client, field: str) -> None:
    assert said(client, CHAT, {field: None}).status_code == 200


@pytest.mark.parametrize("field", [*BOTH, "max_tokens", "suffix", "echo", "best_of"])
def test_null_is_the_same_as_nothing_in_a_completion(client: httpx.Client, field: str) -> None:
    assert said(client, TEXT, {field: None}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tool_choice": "auto"},
        {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"store": True, "metadata": {"a": "b"}, "user": "me"},
        {"parallel_tool_calls": False},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1},
        {"service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "x", "modalities": ["text"]},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(client: httpx.Client, fields: dict[str, Any]) -> None:
    found = said(client, CHAT, fields)
    assert found.status_code == 200, found.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'"),
        ({"tool_choice": "required"}, "tool_choice: Input should be 'auto' or 'none'"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "should be 'auto' or 'none'"),
        ({"n": 2}, "n: Input should be 1"),
        ({"frequency_penalty": 0.1}, "frequency_penalty.*0"),
        ({"logit_bias": {"5": 1}}, "logit_bias.*at most 0"),
        ({"service_tier": "priority"}, "service_tier: Input should be 'auto' or 'default'"),
        ({"reasoning_effort": None}, "reasoning_effort: Extra inputs"),
        ({"model": None}, "model: Field required"),
        ({"temperature": "NaN"}, "temperature"),
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused(client: httpx.Client, fields: dict[str, Any], words: str) -> None:
    found = said(client, CHAT, fields)
    assert found.status_code == 400
    assert re.search(words, found.json()["error"]["message"])


def test_no_tool_is_offered_where_none_may_be_called(client: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert ChatBody.model_validate({**CHAT, "tools": tools}).tools_offered == tools
    assert ChatBody.model_validate({**CHAT, "tools": tools, "tool_choice": "none"}).tools_offered is None


# -- how much ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (TEXT, {"prompt": ["x"] * 5000}),
        (TEXT, {"prompt": [[1]] * 5000}),
        (TEXT, {"prompt": ["x"] * 6}),  # two slots, and three may wait
        (TEXT, {"stop": ["x"] * 17}),
        (TEXT, {"metadata": {str(i): "x" for i in range(17)}}),
        (TEXT, {"user": "x" * 1000}),
        (CHAT, {"tools": [{}] * 129}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 4097}),
    ],
    ids=",".join,
)
def test_no_list_is_without_an_end(client: httpx.Client, body: dict[str, Any], fields: dict[str, Any]) -> None:
    found = said(client, body, fields)
    assert found.status_code == 400
    assert re.search("at most|have room for", found.json()["error"]["message"])
    assert len(found.content) < 5000


def test_as_many_prompts_as_find_room_are_answered(client: httpx.Client) -> None:
    assert len(said(client, TEXT, {"prompt": ["x"] * 5}).json()["choices"]) == 5


def test_a_million_wrong_items_are_one_problem(client: httpx.Client) -> None:
    begun = time.perf_counter()
    found = said(client, TEXT, {"prompt": [1] * 500_000 + ["x"] * 500_000})
    assert found.status_code == 400
    assert len(found.content) < 2000
    assert time.perf_counter() - begun < 3


def test_a_text_goes_on_from_its_prompt_and_a_chat_does_not(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Noted(Text):
        def __init__(self, tokenizer: Any, stops: Any, after: Any = ()) -> None:
            seen.append(tuple(after))
            super().__init__(tokenizer, stops, after)

    monkeypatch.setattr("loratune.serve.answering.Text", Noted)
    assert said(client, TEXT, {"prompt": [[5, 6], [7]]}).status_code == 200
    assert said(client, CHAT, {}).status_code == 200
    assert seen == [(5, 6), (7,), ()]


def test_alternatives_without_probabilities_are_not_left_out(client: httpx.Client) -> None:
    found = said(client, CHAT, {"top_logprobs": 2})
    assert found.status_code == 400
    assert "top_logprobs is for logprobs: true" in found.json()["error"]["message"]
    assert said(client, CHAT, {"top_logprobs": None}).status_code == 200


def test_a_body_that_is_no_json_says_where(client: httpx.Client) -> None:
    """And names no field, since there is none."""
    json = {"content-type": "application/json"}
    error = client.post("/v1/completions", content='{"model": "a", }', headers=json).json()["error"]
    assert error["message"].startswith("body: no JSON at character 15: ")
    assert error["param"] is None


@pytest.mark.parametrize(
    ("content", "kind"), [('{"model": "a", "prompt": "x"}', "text/plain"), ("[1]", "application/json")]
)
def test_a_body_that_is_no_object_says_what_to_send(client: httpx.Client, content: str, kind: str) -> None:
    found = client.post("/v1/completions", content=content, headers={"content-type": kind})
    assert found.status_code == 400
    assert "send a JSON object, with Content-Type: application/json" in found.json()["error"]["message"]


def test_what_is_deep_is_no_failure(client: httpx.Client) -> None:
    for deep in ("[" * 200_000, '{"model": "a", "prompt": ' + "[" * 5000 + "]" * 5000 + "}"):
        found = client.post("/v1/completions", content=deep, headers={"content-type": "application/json"})
        assert found.status_code == 400
        assert found.json()["error"]["message"]


def test_a_large_prompt_keeps_nobody_waiting(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one prompt is made into tokens, the server answers others."""
    found = service(shelf, "a")
    begun, go_on = threading.Event(), threading.Event()
    tokenizer = found.tokenizer
    original = type(tokenizer).__call__

    def slowly(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        if text == "large":
            begun.set()
            assert go_on.wait(20)
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", slowly)
    with asked_here(found) as client, ThreadPoolExecutor(2) as pool:
        large = pool.submit(client.post, "/v1/completions", json={**TEXT, "prompt": "large"})
        assert begun.wait(20)
        try:
            assert pool.submit(client.get, "/health").result(5).status_code == 200
        finally:
            go_on.set()
        assert large.result(20).status_code == 200


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 405)]
)
def test_every_refusal_has_one_form(client: httpx.Client, method: str, path: str, status: int) -> None:
    found = client.request(method, path)
    assert found.status_code == status
    assert path in found.json()["error"]["message"]
    assert found.json()["error"]["type"] == "invalid_request_error"
    if status == 405:
        assert found.headers["allow"]


def test_a_failure_of_the_server_has_it_too(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    found = service(shelf, "a")
    monkeypatch.setattr(type(found.library), "folders", property(lambda _: 1 / 0))
    with asked_here(found) as client:
        answer = client.get("/v1/models")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "division" not in answer.text
