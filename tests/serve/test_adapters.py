"""Adapters that come and go while others answer, and who may bring them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import Server, Shelf, Start
from tests.serve.test_openai import ask


@pytest.fixture
def clean(server: Server) -> Iterator[Server]:
    yield server
    for name in ("late", "one", "two"):
        server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def load(server: Server, name: str, path: str) -> httpx.Response:
    return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def names(server: Server) -> set[str]:
    return {one.id for one in server.openai.models.list().data}


def test_load_ask_unload(clean: Server) -> None:
    before = ask(clean, "a", "hi").choices[0].message.content
    assert load(clean, "late", "late").json() == {"status": "loaded", "model": "late"}
    assert "late" in names(clean)
    late = ask(clean, "late", "hi").choices[0].message.content
    assert late != before
    # There is room for three: the one that was asked for least lately made way, and comes back when it is asked for.
    assert [ask(clean, name, "hi").choices[0].message.content for name in ("a", "b", "c", "late", "a")][::4] == [
        before
    ] * 2
    assert clean.http.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
    assert "late" not in names(clean)
    assert clean.http.post("/v1/chat/completions", json={"model": "late", "messages": []}).status_code == 400
    again = clean.http.post("/v1/unload_lora_adapter", json={"lora_name": "late"})
    assert again.status_code == 404


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("one", "..", "is no folder inside"),
        ("one", "../tiny-llama", "is no folder inside"),
        ("one", "/etc", "is no folder inside"),
        ("one", "nowhere", "is no folder inside"),
        ("one", "a\x00b", "is no folder inside"),
        ("a", "late", "taken already"),
        ("tiny-llama", "late", "taken already"),
        ("one", "dora", "DoRA.*merge"),
        ("one", "stranger", "another base"),
        ("x/y", "late", "lora_name"),
    ],
    ids=repr,
)
def test_refused(clean: Server, name: str, path: str, words: str) -> None:
    before = names(clean)
    found = load(clean, name, path)
    assert found.status_code == 400
    assert re.search(words, found.json()["error"]["message"], re.DOTALL)
    assert names(clean) == before
    assert ask(clean, "a", "hi", 2).choices


def test_a_refusal_tells_no_path_of_the_machine(clean: Server, shelf: Shelf) -> None:
    broken = shutil.copytree(shelf.adapters / "late", shelf.adapters / "broken")
    try:
        (broken / "adapter_model.safetensors").write_bytes(b"broken")
        message = load(clean, "one", "broken").json()["error"]["message"]
        assert message.startswith("broken/adapter_model.safetensors is damaged")
        (broken / "adapter_model.safetensors").unlink()
        assert load(clean, "one", "broken").json()["error"]["message"].startswith("broken holds no adapter")
        for name in ("dora", "stranger", "nowhere"):
            assert str(shelf.adapters) not in load(clean, "one", name).text
    finally:
        shutil.rmtree(broken)


def test_links_out_of_the_folder_are_not_followed(clean: Server, shelf: Shelf, tmp_path: Path) -> None:
    link = shelf.adapters / "link"
    shutil.copytree(shelf.adapters / "late", tmp_path / "elsewhere")  # sound: only its place is wrong
    link.symlink_to(tmp_path / "elsewhere")
    try:
        found = load(clean, "one", "link")
        assert found.status_code == 400
        assert "is no folder inside" in found.json()["error"]["message"]
        link.unlink()
        link.symlink_to(shelf.adapters / "late")
        assert load(clean, "one", "link").status_code == 200
        link.unlink()
        shutil.copytree(shelf.adapters / "late", link)
        (link / "adapter_model.safetensors").unlink()
        (link / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere" / "adapter_model.safetensors")
        assert load(clean, "two", "link").status_code == 400
    finally:
        shutil.rmtree(link) if link.is_dir() and not link.is_symlink() else link.unlink()


def test_without_a_folder_nothing_is_loaded_by_request_and_keys_are_asked_for(start: Start, shelf: Shelf) -> None:
    server = start(names=("a",), environment={"LORATUNE_API_KEY": "secret"})
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
        found = server.http.get("/v1/models", headers=headers)
        assert found.status_code == 401
        assert found.json()["error"]["type"] == "invalid_api_key"
    assert server.http.get("/health").status_code == 200
    known = {"authorization": "Bearer secret"}
    assert server.http.get("/v1/models", headers=known).status_code == 200
    body = {"lora_name": "late", "lora_path": str(shelf.adapters / "late")}
    found = server.http.post("/v1/load_lora_adapter", json=body, headers=known)
    assert found.status_code == 400
    assert "--adapter-dir" in found.json()["error"]["message"]


def test_who_finds_no_room_is_told_so(start: Start) -> None:
    server = start("--queue", "0", "--slots", "1", names=("a",), pause=0.3)
    asked = {"model": "a", "prompt": "x", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=60) as first:
        lines = first.iter_lines()  # kept: one that is forgotten closes the answer
        next(lines)
        second = server.http.post("/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 1})
        assert second.status_code == 429
        assert second.headers["retry-after"]
        assert second.json()["error"]["type"] == "overloaded"
    # Two would never find room.
    both = server.http.post("/v1/completions", json={"model": "a", "prompt": ["x", "y"], "max_tokens": 1})
    assert both.status_code == 400
    assert "2 prompts" in both.json()["error"]["message"]


def test_a_server_that_is_told_to_end_lets_answers_end(start: Start) -> None:
    server = start(names=("a",), pause=0.2)
    asked = {"model": "a", "prompt": "x", "max_tokens": 15, "temperature": 0, "ignore_eos": True}
    whole = server.http.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    asked["stream"] = True
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=60) as answer:
        lines = answer.iter_lines()
        seen = [next(lines)]
        server.process.terminate()
        told = time.monotonic()
        seen += list(lines)
    assert time.monotonic() - told > 1, "it was under way"
    assert seen[-2] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in seen if line.startswith("data: {"))
    assert text == whole
    assert server.process.wait(30) == 0


def test_a_server_that_is_told_twice_ends_at_once_and_in_order(start: Start) -> None:
    """No thread is left inside the model when the interpreter goes: that would abort the process."""
    server = start(names=("a",), pause=0.3)
    asked = {"model": "a", "prompt": "x", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        time.sleep(1)
        server.process.send_signal(signal.SIGINT)
        code = server.process.wait(20)
    said = server.process.communicate()[1]
    assert code in (0, 130), said
    assert "Traceback" not in said
    assert "terminate called" not in said


def test_refused_before_it_starts(start: Start, shelf: Shelf) -> None:
    with pytest.raises(AssertionError) as caught:
        start(names=("a", "dora", "stranger"))
    said = str(caught.value)
    assert "dora:" in said
    assert "stranger:" in said
    assert "Traceback" not in said
