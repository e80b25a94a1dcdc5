"""Requests made from the server's own description of itself: whatever comes, no answer is a failure of the server."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.serve.conftest import Server
from tests.serve.test_openai import ask

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


def test_no_request_breaks_the_server(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    before = ask(server, "a", "hi", 4).choices[0].message.content
    seen: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation: Any = found.ok()

        @QUICK
        @given(case=operation.as_strategy())
        def call(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
                case.body["max_tokens"] = min(case.body["max_tokens"], 3)
            answer = case.call(timeout=60)
            assert answer.status_code < 500, (case.method, case.path, case.body, answer.text)
            seen.setdefault(case.path, set()).add(answer.status_code)

        call()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/models"} <= seen.keys()
    assert 200 in seen["/v1/models"]
    assert 400 in seen["/v1/completions"]
    assert ask(server, "a", "hi", 4).choices[0].message.content == before
