"""The server's page in a real browser: a tab, and what scripts tell of it."""

import json
import re
import time
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect

SCROLLER = "document.getElementById('scroller')"
SHORT_WAIT = 20_000  # milliseconds; the machine may be busy
LONG = {"ignore_eos": True, "max_completion_tokens": 1800}  # an answer that is still under way when one acts on it
# Notes how long the latest answer is, each time that it changes.
WATCH_GROWTH = """() => {
  window.lengths = [];
  const latest = () => [...document.querySelectorAll('.assistant')].at(-1)?.querySelector('.prose:not(details *)');
  new MutationObserver(() => window.lengths.push(latest()?.textContent.length ?? 0))
    .observe(document.getElementById('messages'), {childList: true, subtree: true, characterData: true});
}"""
# The texts whose contrast with what they stand on is below WCAG's 4.5, and that contrast.
CONTRAST = """() => {
  const UNSEEN = '.visually-hidden, .skip, option, noscript, script';
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const over = (layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (color) => {
    const [r, g, b] = color.map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest(UNSEEN)) continue;
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
    const below = over(layers), text = over([...layers, getComputedStyle(element).color]);
    const [a, b] = [light(below), light(text)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push([walker.currentNode.data.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]);
  }
  return bad;
}"""
# Marks what gets the focus as reached, and notes what then does not show that it has it.
WATCH_FOCUS = """() => {
  window.withoutRing = [];
  const shows = (element) => getComputedStyle(element).outlineStyle !== 'none';
  document.addEventListener('focusin', ({target}) => {
    target.dataset.reached = 1;
    if (!shows(target) && !shows(target.closest('.composer') ?? target)) window.withoutRing.push(target.outerHTML);
  });
}"""
PARTS = """async (texts) => {
  const { newAnswer, parts } = await import('/page/conversation.js');
  const found = texts.map((content) => parts({...newAnswer('demo'), content}));
  return found.map(({reasoning, answer, isOpen}) => [reasoning, answer, isOpen]);
}"""
# What reaches over the window's right edge, unless one can scroll to it within something that does not.
TOO_WIDE = """() => [...document.querySelectorAll('body, body *')]
  .filter((one) => one.checkVisibility() && !one.closest('.scroll, pre, .visually-hidden, .skip'))
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5)
  .map((one) => one.outerHTML.slice(0, 200))"""
RENDER = """async (text) => {
  const box = document.getElementById('rendered') ?? document.createElement('div');
  box.id = 'rendered';
  document.body.append(box);
  (await import('/page/markdown.js')).renderMarkdown(box, text);
}"""
TIME_RENDERING = """async (texts) => {
  const { renderMarkdown } = await import('/page/markdown.js');
  const began = performance.now();
  for (const text of texts) renderMarkdown(document.createElement('div'), text);
  return (performance.now() - began) / 1000;
}"""
# A line of an accessibility tree: a role that needs a name, without one.
NAMELESS = re.compile(
    r"- (?:button|textbox|combobox|checkbox|spinbutton|link|toolbar|tooltip|main|navigation)(?=:|$| \[).*"
)
HOSTILE_PIECES = (
    *("[", "![", "`", "*a", "**", "_a ", "> ", "- ", "|", "|-", "<http", "~~", "- " * 9 + "a\n", "  - a\n"),
    *("\n```x\n", "a|b\n-|-\n", "[a](", "<https://a", "***a** ", "1. a\n\n"),
)


class Visit:
    """A tab with the page, and what must not happen in it."""

    def __init__(self, browser: Browser, url: str, *, has_models: bool = True, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(SHORT_WAIT)
        self.complaints: list[str] = []
        self.origins: set[str] = set()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "request", lambda request: self.origins.add("{0.scheme}://{0.netloc}".format(urlsplit(request.url)))
        )
        self.page.goto(url)
        if has_models:
            expect(self.page.locator("#model option")).not_to_have_count(0)

    def _console(self, message: ConsoleMessage) -> None:
        # The browser itself reports an answer of status 400 and above as an error.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def wait_for_answer(self) -> str:
        """The latest answer, once it has ended."""
        latest = self.page.locator(".assistant").last
        expect(latest.get_by_role("button", name="Regenerate answer")).to_be_visible()
        return latest.locator(".prose").last.text_content() or ""

    def wait_until(self, script: str) -> None:
        """Poll until a script is true; Playwright's own way needs `eval`, which the page's policy forbids."""
        deadline = time.monotonic() + SHORT_WAIT / 1000
        while not self.page.evaluate(script):
            assert time.monotonic() < deadline, script
            self.page.wait_for_timeout(20)

    def limit_speed(self, bytes_per_second: int) -> None:
        """Have what the page downloads come no faster than this from here on, however late the browser reads it.

        -1 stands for no limit.
        """
        session = self.context.new_cdp_session(self.page)
        session.send("Network.enable")
        limits = {"offline": False, "latency": 0, "downloadThroughput": bytes_per_second, "uploadThroughput": -1}
        session.send("Network.emulateNetworkConditions", limits)

    def setting(self, label: str, value: str) -> None:
        if not self.page.locator("#settings").is_visible():
            self.page.get_by_role("button", name="Settings", exact=True).click()
        self.page.get_by_label(label, exact=True).fill(value)

    def change_requests(self, **fields: Any) -> None:
        """Have every question of the page carry these fields too."""

        def change(route: Route) -> None:
            route.continue_(post_data=json.dumps({**route.request.post_data_json, **fields}))

        self.page.route("**/v1/chat/completions", change)
