"""The page in a real browser: two answers side by side, by keyboard, on a phone, without another server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.serve.conftest import Server, Shelf, Start
from tests.serve.test_openai import ask, running, wait_until

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


def test_escape_stops(browser: Any, slow: Server) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(slow.url)
    expect(page.locator("#model-0 option").first).to_be_attached()
    page.fill("#tokens", "100")
    page.fill("#message", "hello")
    page.click("#send")
    wait_until(lambda: running(slow)["loratune_running"] == 2)
    expect(page.locator("#send")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_enabled()
    for side in (0, 1):
        expect(page.locator(f"#note-{side}")).to_have_text("stopped")
    wait_until(lambda: running(slow)["loratune_running"] == 0, 5)
    context.close()


def test_on_a_phone_nothing_sticks_out(browser: Any, server: Server) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, device_scale_factor=2)
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#model-1 option").first).to_be_attached()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    left, right = (page.locator(f"#answer-{side}").bounding_box() for side in (0, 1))
    assert left["y"] < right["y"]
    context.close()


# -- with a key --------------------------------------------------------------------------------------------------------

REPORT = """<!doctype html><title>run</title><style>h1 { color: rgb(1, 2, 3) }</style>
<h1 style="margin: 7px">a report</h1><script>document.title = "owned"</script>
<img src="nowhere" onerror="document.title = 'owned'"><a id="go" href="javascript:document.title = 'owned'">go</a>"""


@pytest.fixture(scope="module")
def locked(start: Start, shelf: Shelf) -> Iterator[Server]:
    report = shelf.adapters / "c" / "report.html"
    report.write_text(REPORT)
    yield start(names=("c",), environment={"LORATUNE_API_KEY": "secret"})
    report.unlink()


def test_the_page_asks_for_the_key_and_shows_reports_with_it(browser: Any, locked: Server) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(locked.url)
    expect(page.locator("#note-0")).to_contain_text("asks for an API key")
    page.fill("#key", "wrong")
    page.keyboard.press("Tab")
    expect(page.locator("#note-0")).to_contain_text("not the server's API key")
    page.fill("#key", "secret")
    page.keyboard.press("Tab")
    expect(page.locator("#note-0")).to_have_text("")
    page.select_option("#model-0", "c")
    with context.expect_page() as opened:
        page.click("#report-0")
    report_is_shown_and_did_nothing(opened.value)
    context.close()


def test_a_report_without_a_key(browser: Any, start: Start, shelf: Shelf, locked: Server) -> None:
    server = start(names=("c",))
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.select_option("#model-0", "c")
    with context.expect_page() as opened:
        page.click("#report-0")
    report_is_shown_and_did_nothing(opened.value)
    context.close()


def report_is_shown_and_did_nothing(report: Any) -> None:
    heading = report.locator("h1")
    expect(heading).to_have_text("a report")
    expect(heading).to_have_css("color", "rgb(1, 2, 3)")
    expect(heading).to_have_css("margin-left", "7px")
    report.click("#go")
    assert report.title() == "run"
