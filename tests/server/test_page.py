"""The page in a real browser: a conversation streams, stops, fails and goes on, and one sees the engine at work; all of
it by keyboard, at any width.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from page_visit import (
    CONTRAST,
    HOSTILE_PIECES,
    LONG,
    NAMELESS,
    PARTS,
    RENDER,
    SCROLLER,
    SHORT_WAIT,
    TIME_RENDERING,
    TOO_WIDE,
    WATCH_FOCUS,
    WATCH_GROWTH,
    Visit,
)
from playwright.sync_api import Browser, expect, sync_playwright

from counting_model import CountingModel

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    # A browser's sandbox does not work for root, as who tests often run in containers.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    expect.set_options(timeout=SHORT_WAIT)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=flags)
        yield running
        running.close()


@pytest.fixture
def visit(browser, server):
    """Open the page; what every visit must not do is checked at its end."""
    visits = []

    def open_page(**options) -> Visit:
        visits.append(Visit(browser, server.url, **options))
        return visits[-1]

    yield open_page
    for one in visits:
        one.context.close()
        assert one.complaints == []
        assert one.origins == {server.url}


def test_a_conversation_streams_and_survives_a_reload(visit):
    tab = visit()
    tab.page.evaluate(WATCH_GROWTH)
    tab.setting("Temperature", "0")
    tab.limit_speed(bytes_per_second=16_000)  # so that even a busy machine's browser sees the answer grow
    tab.ask("Tell me a short story.")
    story = tab.wait_for_answer()
    tab.limit_speed(-1)
    lengths = tab.page.evaluate("window.lengths")
    assert len(set(lengths)) > 3 and lengths == sorted(lengths), lengths
    assert 0 < lengths[len(lengths) // 2] < len(story)
    tab.ask("What is 17 + 25?")
    assert "42" in tab.wait_for_answer()
    tab.page.reload()
    assert tab.page.locator(".bubble").all_inner_texts() == ["Tell me a short story.", "What is 17 + 25?"]
    assert tab.page.locator(".assistant").first.locator(".prose").last.inner_text() == story
    tab.page.get_by_role("button", name="Clear conversation").click()
    tab.page.reload()
    expect(tab.page.locator(".message")).to_have_count(0)


def test_reasoning_is_folded_and_opens(visit):
    tab = visit()
    tab.setting("Temperature", "0")
    tab.ask("What is 17 + 25?")
    assert "think" not in tab.wait_for_answer()
    reasoning = tab.page.locator("details.reasoning")
    expect(reasoning.locator(".prose")).to_be_hidden()
    reasoning.locator("summary").click()
    expect(reasoning.locator(".prose")).to_be_visible()
    assert reasoning.locator(".prose").inner_text().strip()


def test_reasoning_that_the_server_left_in_the_text_is_folded_too(visit):
    texts = ["<think>so", "<think>so</think> 42", "so</think>42", "plain <think>"]
    parted = visit().page.evaluate(PARTS, texts)
    assert parted == [["so", "", True], ["so", "42", False], ["so", "42", False], ["", "plain <think>", False]]


def test_a_tool_call_is_a_card_that_takes_its_result(visit):
    tab = visit()
    tab.setting("Temperature", "0")
    tools = tab.page.get_by_label("Functions, as JSON")
    tools.fill("[{")
    expect(tab.page.locator("#tools-error")).to_contain_text("not valid JSON")
    tab.page.get_by_role("button", name="Example").click()
    expect(tab.page.locator("#tools-error")).to_be_empty()
    tab.ask("What is the weather in Paris?")
    call = tab.page.get_by_role("region", name="Call of the tool get_weather")
    tab.wait_for_answer()
    assert json.loads(call.get_by_role("group", name="Arguments").inner_text()) == {"city": "Paris"}
    tab.page.get_by_label("Result of get_weather").fill('{"weather": "sunny", "degrees": 21}')
    tab.page.get_by_role("button", name="Send result").click()
    expect(tab.page.locator(".assistant")).to_have_count(2)
    assert "sunny" in tab.wait_for_answer()
    expect(call.get_by_role("group", name="Result")).to_contain_text("21")
    expect(tab.page.get_by_label("Message", exact=True)).to_be_focused()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_request_on_the_server(visit, server, how):
    tab = visit()
    tab.change_requests(**LONG)
    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    tab.ask("Tell me a short story.")
    expect(tab.page.locator(".assistant .prose").last).not_to_be_empty()
    if how == "button":
        tab.page.get_by_role("button", name="Stop").click()
    else:
        tab.page.keyboard.press("Escape")
    expect(tab.page.locator(".figures")).to_contain_text("stopped")
    server.wait_for(server.all_pages_are_free, what="the end of the request", seconds=20)
    assert server.metric("vllm:request_success_total", finished_reason="abort") == aborted + 1


def test_the_end_is_followed_until_the_reader_scrolls_up(visit):
    tab = visit(viewport={"width": 800, "height": 400})
    tab.change_requests(**LONG)
    tab.ask("Tell me a short story.")
    tab.wait_until(f"{SCROLLER}.scrollTop > 100")
    tab.page.locator("#scroller").hover()
    tab.page.mouse.wheel(0, -80)
    expect(tab.page.get_by_role("button", name="Scroll to the end")).to_be_visible()
    at, height = tab.page.evaluate(f"[{SCROLLER}.scrollTop, {SCROLLER}.scrollHeight]")
    tab.wait_until(f"{SCROLLER}.scrollHeight > {height}")
    assert tab.page.evaluate(f"{SCROLLER}.scrollTop") == at
    tab.page.get_by_role("button", name="Scroll to the end").click()
    tab.page.get_by_role("button", name="Stop").click()
    tab.wait_for_answer()
    tab.wait_until(f"{SCROLLER}.scrollHeight - {SCROLLER}.clientHeight - {SCROLLER}.scrollTop < 2")


def test_an_error_shows_in_place_and_can_be_retried(visit):
    tab = visit()
    tab.setting("Temperature", "-1")
    tab.ask("What is 17 + 25?")
    expect(tab.page.get_by_role("alert")).to_contain_text("temperature")
    tab.setting("Temperature", "0")
    tab.page.get_by_role("button", name="Retry").click()
    assert "42" in tab.wait_for_answer()
    tab.page.route("**/v1/chat/completions", lambda route: route.abort())
    tab.ask("And now?")
    expect(tab.page.get_by_role("alert").last).to_contain_text("cannot be reached")
    tab.page.unroute_all()
    tab.page.get_by_role("button", name="Retry").click()
    tab.wait_for_answer()
    expect(tab.page.locator(".problem:visible")).to_have_count(0)


def test_an_edited_message_and_a_regenerated_answer_replace_what_was_there(visit):
    tab = visit()
    tab.setting("Temperature", "0")
    tab.ask("What is 17 + 25?")
    tab.wait_for_answer()
    tab.page.get_by_role("button", name="Edit message").click()
    tab.page.get_by_label("Edit message").fill("What is 10 + 25?")
    tab.page.keyboard.press("Enter")
    assert "35" in tab.wait_for_answer()
    tab.page.get_by_role("button", name="Regenerate answer").click()
    assert "35" in tab.wait_for_answer()
    assert tab.page.locator(".message").count() == 2


def test_token_probabilities_show_on_hover_and_by_arrow_keys(visit):
    tab = visit()
    tab.setting("Temperature", "0")
    tab.page.get_by_label(re.compile("Token probabilities")).check()
    tab.ask("What is the capital of France?")
    tab.wait_for_answer()
    tokens = tab.page.locator(".token")
    assert tokens.all_inner_texts()[:3] != []
    detail = tab.page.get_by_role("tooltip")
    tokens.nth(2).hover()
    expect(detail.get_by_role("row")).to_have_count(5)
    expect(detail.locator(".chosen .figure")).to_contain_text("%")
    tab.page.mouse.move(5, 5)
    expect(detail).to_be_hidden()
    tokens.first.focus()
    tab.page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(detail).to_be_visible()
    tab.page.get_by_role("button", name="Show token probabilities").click()
    expect(tokens.first).to_be_hidden()
    assert "Paris" in tab.page.locator(".assistant .prose").last.inner_text()


def test_light_and_dark_follow_the_system_and_the_button_and_are_legible(visit):
    for scheme in ("light", "dark"):
        tab = visit(color_scheme=scheme)
        tab.setting("Temperature", "-1")
        tab.ask("Hello")
        expect(tab.page.get_by_role("alert")).to_be_visible()
        assert tab.page.evaluate(CONTRAST) == []
        background = "getComputedStyle(document.documentElement).backgroundColor"
        first = tab.page.evaluate(background)
        tab.page.get_by_role("button", name="Switch between light and dark").click()
        second = tab.page.evaluate(background)
        assert first != second
        tab.page.reload()
        assert tab.page.evaluate(background) == second
        assert tab.page.evaluate(CONTRAST) == []


def test_a_phone_needs_no_horizontal_scrolling(visit):
    tab = visit(viewport={"width": 375, "height": 667}, has_touch=True)
    wide = (
        "| "
        + " | ".join(f"column {n}" for n in range(12))
        + " |\n|"
        + "---|" * 12
        + "\n| cell |\n```\n"
        + "x" * 300
        + "\n```"
    )
    said = [{"role": "user", "content": "y" * 300}, {"role": "assistant", "content": wide, "model": "demo"}]
    tab.page.evaluate("(said) => localStorage.setItem('jax-engine-conversation', JSON.stringify(said))", said)
    tab.page.reload()
    expect(tab.page.locator(".assistant td, .assistant th").first).to_be_visible()
    for panel in (None, "Settings", "Engine"):
        if panel:
            tab.page.get_by_role("button", name=panel, exact=True).click()
        assert tab.page.evaluate(TOO_WIDE) == []
        if panel:
            sheet = tab.page.get_by_role("complementary", name=panel)
            assert sheet.evaluate("(sheet) => sheet.getBoundingClientRect().width") == 375
            tab.page.keyboard.press("Escape")
            expect(tab.page.get_by_role("button", name=panel, exact=True)).to_be_focused()


def test_every_control_has_a_name_and_the_keyboard_reaches_it_visibly(visit):
    tab = visit()
    tab.page.get_by_role("button", name="Settings", exact=True).click()
    tab.page.get_by_label(re.compile("Token probabilities")).check()
    tab.ask("What is 17 + 25?")
    tab.wait_for_answer()
    tab.page.evaluate(WATCH_FOCUS)
    for _ in range(45):
        tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("window.withoutRing") == []
    controls = tab.page.locator(":is(button, input, select, textarea, summary, a):visible")
    unreached = controls.evaluate_all("(all) => all.filter((one) => !one.dataset.reached).map((one) => one.outerHTML)")
    assert unreached == []
    tree = tab.page.locator("body").aria_snapshot()
    assert NAMELESS.findall(tree) == [], tree
    for landmark in ("banner", "navigation", "main", "complementary"):
        assert f"- {landmark}" in tree, tree


def test_markdown_is_shown_and_html_in_it_stays_text(visit):
    tab = visit()
    text = (
        "# Title\n\nSome **bold**, *slanted*, `code`, ~~gone~~ and snake_case_name.\n\n1. one\n   - inner\n2. two\n\n"
        "| a | b |\n|:--|--:|\n| 1 | `x|y` |\n\n> quoted\n\n```python\nprint('<b>')\n```\n\n"
        "<img src=x onerror=alert(1)> [bad](javascript:alert(1)) [good](https://example.com) ![image](https://example.com/i.png)"
        "\n\n```\nstill open"
    )
    tab.page.evaluate(RENDER, text)
    html = tab.page.locator("#rendered").inner_html()
    for expected in (
        "<h3>Title</h3>",
        "<strong>bold</strong>",
        "<em>slanted</em>",
        "<del>gone</del>",
        "snake_case_name",
        "<ol><li>one<ul><li>inner</li></ul></li><li>two</li></ol>",
        '<td class="align-right"><code>x|y</code></td>',
        "<blockquote><p>quoted</p></blockquote>",
        "<code>print('&lt;b&gt;')</code>",
        "&lt;img src=x onerror=alert(1)&gt;",
        "<code>still open</code>",
    ):
        assert expected in html, html
    assert "<img" not in html and "javascript:" not in re.sub(r">[^<]*<", "><", html)
    assert re.findall(r'href="([^"]*)"', html) == ["https://example.com", "https://example.com/i.png"]


def test_hostile_markdown_takes_no_time(visit):
    tab = visit()
    texts = [piece * (20_000 // len(piece)) for piece in HOSTILE_PIECES]
    seconds = tab.page.evaluate(TIME_RENDERING, texts)
    assert seconds < 5


def test_the_page_is_its_own_files_and_its_policy_allows_nothing_from_elsewhere(server):
    with httpx.Client(base_url=server.url) as client:
        start = client.get("/")
        assert start.headers["content-type"] == "text/html; charset=utf-8"
        policy = start.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        for path in re.findall(r'(?:src|href)="(page/[^"]+)"', start.text):
            file = client.get(path)
            assert file.status_code == 200 and file.headers["x-content-type-options"] == "nosniff"
            again = client.get(path, headers={"if-none-match": file.headers["etag"]})
            assert again.status_code == 304 and not again.content
        assert client.get("/page/nothing.js").status_code == 404
        assert client.get("/page/..%2Fgate.py").status_code == 404


def test_the_live_view_moves(visit, server):
    tab = visit()
    engine = tab.page.get_by_role("complementary", name="Engine")
    expect(engine.get_by_text("No request is in flight.")).to_be_visible()
    pages, steps = engine.get_by_role("img", name=re.compile("KV pages in use")), engine.locator("svg.columns")
    assert pages.get_attribute("aria-label").startswith("0 of ")
    before = steps.get_attribute("aria-label")
    with generating(server, prompts=["Once upon a time", "One day"], n=40):
        expect(engine.locator(".tile", has_text="Running").locator(".value")).to_have_text("64")
        expect(engine.locator(".tile", has_text="Waiting").locator(".value")).to_have_text("16")
        expect(tab.page.locator("#status-text")).to_contain_text("64 running")
        expect(engine.get_by_role("row")).to_have_count(1 + 20 + 16)
        expect(engine.get_by_role("cell", name="waits").first).to_be_visible()
        expect(pages).not_to_have_attribute("aria-label", re.compile("^0 of "))
        assert engine.locator(".cell-map .own").get_attribute("d")
        expect(steps).not_to_have_attribute("aria-label", before)
        first = steps.locator(".decode").get_attribute("d")
        expect(steps.locator(".decode")).not_to_have_attribute("d", first)
        expect(engine.locator(".tile .value").nth(2)).not_to_have_text("0")
    expect(engine.get_by_text("No request is in flight.")).to_be_visible()


@contextmanager
def generating(server, *, prompts, n):
    """Have the server generate meanwhile, and drop it then."""
    body = {"prompt": prompts, "n": n, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines, stop = response.raise_for_status().iter_lines(), threading.Event()

        def read() -> None:
            for _ in lines:
                if stop.is_set():
                    return

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield
        finally:
            stop.set()
            reader.join()


def test_a_start_is_watched_with_a_key(browser, start_server, tmp_path):
    model = CountingModel.write(tmp_path, max_model_len=8192)
    small = ("--max-num-seqs", "8", "--max-num-batched-tokens", "8", "--kv-cache-memory-bytes", "8M")
    options = ("--api-key", "the-key", "--served-model-name", "counting")
    server = start_server(str(model.folder), *small, *options, ready=False)
    assert httpx.get(f"{server.url}/engine_state").status_code == 401
    tab = Visit(browser, server.url, has_models=False, reduced_motion="reduce")
    expect(tab.page.locator("#notice")).to_contain_text("asks for an API key")
    tab.page.get_by_role("button", name="Enter the key").click()
    tab.page.get_by_label("API key").fill("the-key")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#notice")).to_contain_text("the engine is starting")
    assert tab.page.evaluate("document.getAnimations().length") == 0
    expect(tab.page.locator("#status-text")).to_have_text("Ready", timeout=120_000)
    expect(tab.page.locator("#notice")).to_be_hidden()
    expect(tab.page.locator("#model option")).to_have_text(["counting"])
    assert "the-key" not in tab.page.evaluate("JSON.stringify(localStorage)")
    tab.context.close()
    assert tab.complaints == []
    assert "engine_state" not in server.log()
