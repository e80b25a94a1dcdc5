"""The page in a real browser: two answers side by side, by keyboard, on a phone, without another server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.serve.conftest import Server
from tests.serve.test_openai import ask

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    found = context.new_page()
    asked: list[str] = []
    failed: list[str] = []
    found.on("request", lambda request: asked.append(request.url))
    found.on("pageerror", lambda error: failed.append(str(error)))
    # The browser itself tells of answers that refuse.
    found.on("console", lambda said: failed.append(said.text) if "status of 400" not in said.text else None)
    found.goto(server.url)
    expect(found.locator("#model-0 option").first).to_be_attached()
    yield found
    assert not failed
    assert all(url.startswith((server.url, "data:")) for url in asked), "nothing comes from elsewhere"
    context.close()


def test_two_answers_to_one_question(page: Any, server: Server) -> None:
    page.select_option("#model-0", "a")
    page.select_option("#model-1", "tiny-llama")
    page.fill("#tokens", "10")
    page.locator("#message").focus()
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    for side, name in enumerate(("a", "tiny-llama")):
        expect(page.locator(f"#note-{side}")).to_contain_text("tokens/s")
        answer = ask(server, name, "hello", 10, seed=0)
        assert page.locator(f"#answer-{side}").inner_text() == answer.choices[0].message.content.strip("\n")
        assert page.locator(f"#note-{side}").inner_text().startswith(f"{answer.usage.completion_tokens} tokens")
    assert page.locator("#message").evaluate("element => element === document.activeElement")


def test_a_refusal_is_shown(page: Any) -> None:
    page.fill("#message", "long " * 400)
    page.click("#send")
    expect(page.locator("#answer-0")).to_contain_text("a row at most 128")
    expect(page.locator("#send")).to_be_enabled()


def test_escape_stops(page: Any, server: Server) -> None:
    page.fill("#tokens", "100")
    page.fill("#temperature", "1.9")
    page.fill("#message", "hello")
    page.click("#send")
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_enabled()


def test_on_a_phone_nothing_sticks_out(browser: Any, server: Server) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, device_scale_factor=2)
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#model-1 option").first).to_be_attached()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    left, right = (page.locator(f"#answer-{side}").bounding_box() for side in (0, 1))
    assert left["y"] < right["y"]
    context.close()
