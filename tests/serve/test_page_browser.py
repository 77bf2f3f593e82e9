"""The chat page and the dashboard in Chromium, against the scripted engine behind a real server."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
DSML = "\uff5cDSML\uff5c"
EVIL = (
    "<script>window.hit = 1</script> <img src=x onerror='window.hit = 2'> [a](javascript:window.hit=3) "
    "[b](JaVaScRiPt:window.hit=3) [c](data:text/html,<script>window.hit=4</script>) <javascript:window.hit=5> "
    '![d](x" onerror="window.hit=6) <svg onload=window.hit=7> [e](https://ok.example/"onmouseover="window.hit=8)\n\n'
    '```html"><script>window.hit=9</script>\n<script>window.hit=10</script>\n```\n\n'
    "| <b onclick=window.hit=11>x</b> |\n|---|\n| <iframe srcdoc='<script>parent.hit=12</script>'> |"
)


def call(name: str, **arguments: Any) -> str:
    lines = "".join(
        f'<{DSML}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</{DSML}parameter>\n"
        for key, value in arguments.items()
    )
    return f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="{name}">\n{lines}</{DSML}invoke>\n</{DSML}tool_calls>'


def rule(words: str, reply: str, **more: Any) -> dict[str, Any]:
    """Answers when the last turn of the user has these words."""
    return {"when": f"{words}[^\uff5c]*<\uff5cAssistant\uff5c></?think>$", "reply": reply, **more}


SCRIPT = {
    "token_delay_ms": 2,
    "rules": [
        rule("story", "A plan.</think>" + "Once upon a time there was a sea. " * 40, token_delay_ms=15),
        rule("weather", "I should look.</think>One moment." + call("get_weather", city="Lisbon", days=3)),
        rule("sunny", "The tool says so.</think>It is **sunny** in Lisbon."),
        rule("evil", f"{EVIL}</think>{EVIL}" + call("get_weather", city=EVIL)),
        rule("break", "Hm.</think>Half an ans", fail="the engine broke"),
        rule("slow", "Let me think about it for a while. " * 4 + "</think>Done.", token_delay_ms=30),
        {"when": "<think>$", "reply": "A greeting.</think>Hello, **you**!\n\n```python\nprint(1)\n```"},
        {"reply": "Hello without thinking."},
    ],
}  # fmt: skip
TOOLS = '[{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    script = tmp_path_factory.mktemp("page") / "script.json"
    script.write_text(json.dumps(SCRIPT), encoding="utf-8")
    command = [sys.executable, "-m", "pelagos", "serve", "--engine", f"scripted:{script}", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT / "src", stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            raise AssertionError("the server did not start: " + "".join(said))
        reading = threading.Thread(target=server.stderr.read)
        reading.start()
        yield found[0]
        server.terminate()
        reading.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """Opens a page in a profile of its own; at the end no script may have failed and no policy been crossed."""
    contexts, problems = [], []

    def watch(page: Page) -> None:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)

    def open_one(
        path: str = "/", *, width: int = 1100, route: tuple[str, Callable[[Route], None]] | None = None, **options: Any
    ) -> Page:
        context = chromium.new_context(base_url=url, viewport={"width": width, "height": 740}, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        if route is not None:
            context.route(*route)
        page = context.new_page()
        watch(page)
        page.goto(path)
        page.wait_for_selector("#status.ready")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()


def until(page: Page, condition: str, argument: Any = None) -> None:
    """Wait for a JavaScript condition; the page's policy forbids the driver's own polling, which needs eval."""
    end = time.monotonic() + 10
    while not page.evaluate(condition, argument):
        assert time.monotonic() < end, f"waited 10 s for {condition}"
        page.wait_for_timeout(30)


def send(page: Page, text: str, *, wait: bool = True) -> None:
    before = page.locator(".answer").count()
    page.fill("#input", text)
    page.press("#input", "Enter")
    until(page, "n => document.querySelectorAll('.answer').length > n", before)
    if wait:
        finished(page)


def send_in_place(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")
    until(page, "text => [...document.querySelectorAll('.bubble')].at(-1).innerText === text", text)
    finished(page)


def finished(page: Page) -> None:
    page.wait_for_selector(".answer:last-child:not(.busy) > footer")


def last_text(page: Page) -> str:
    return page.locator(".answer").last.locator("> .text").inner_text()


def test_an_answer_streams_and_its_thinking_folds(page: Page) -> None:
    send(page, "slow please", wait=False)
    page.wait_for_selector(".answer.busy .thinking[open]")
    assert "Thinking" in page.inner_text(".thinking summary")
    early = page.inner_text(".thought")
    until(page, "n => document.querySelector('.thought').innerText.length > n", len(early))
    finished(page)
    assert re.fullmatch(r"Thought for \d+(\.\d)? s", page.inner_text(".thinking summary"))
    assert page.get_attribute(".thinking", "open") is None
    page.click(".thinking summary")
    assert page.inner_text(".thought").startswith("Let me think")
    assert last_text(page) == "Done."
    assert re.search(r"\d+ tokens · .*tok/s · .* from cache", page.inner_text(".note"))
    assert page.inner_text("#spoken") == "Done."
    assert page.title().startswith("slow please")


def test_stop_keeps_what_came(page: Page) -> None:
    send(page, "a long story", wait=False)
    until(page, "document.querySelector('.answer > .text').innerText.length > 40")
    page.press("#input", "Escape")
    finished(page)
    assert "stopped" in page.inner_text(".note")
    kept = last_text(page)
    assert 40 < len(kept) < 1000
    send(page, "hi")
    assert page.locator(".answer").first.locator("> .text").inner_text() == kept


def test_regenerate_and_edit_lose_nothing(page: Page) -> None:
    send(page, "hi")
    send(page, "will it be sunny?")
    page.locator(".answer").first.hover()
    page.locator(".answer").first.get_by_role("button", name="Regenerate").click()
    finished(page)
    assert page.locator(".answer").count() == 1
    assert page.inner_text(".answer .versions span") == "2 of 2"
    page.get_by_role("button", name="Version before").click()
    assert page.locator(".answer").count() == 2, "the branch that was left is whole"
    page.press("#input", "ArrowUp")
    assert page.input_value("#input") == "will it be sunny?"
    send_in_place(page, "something else")
    assert last_text(page).startswith("Hello, you!")
    assert page.locator(".user").last.locator(".bubble").inner_text() == "something else"
    page.locator(".user").last.hover()
    page.locator(".user").last.get_by_role("button", name="Version before").click()
    assert last_text(page) == "It is sunny in Lisbon."
    page.locator(".user").first.hover()
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    assert page.input_value("#input") == "hi"
    page.keyboard.press("Escape")
    assert (page.input_value("#input"), page.is_visible("#editing")) == ("", False)


def test_an_answer_goes_on_while_another_is_looked_at(page: Page) -> None:
    send(page, "hi")
    page.press("#input", "ArrowUp")
    page.fill("#input", "slow please")
    page.press("#input", "Enter")
    page.wait_for_selector(".answer.busy .thinking")
    page.locator(".user").last.hover()
    page.locator(".user").get_by_role("button", name="Version before").click()
    assert page.locator(".answer.busy").count() == 0
    assert last_text(page).startswith("Hello, you!")
    page.locator(".user").last.hover()
    page.locator(".user").get_by_role("button", name="Next version").click()
    page.wait_for_selector(".answer.busy .thinking")
    page.click("#new")
    page.wait_for_selector("#chats li.busy")
    page.wait_for_selector("#chats li:not(.busy)")
    page.click("#chats .open")
    assert last_text(page) == "Done."


def test_code_is_copied(open_page: Callable[..., Page]) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    send(page, "hi")
    page.locator("figure.code").get_by_role("button", name="Copy").click()
    page.wait_for_selector("figure.code button:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == "print(1)"
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined})"
    )  # as on plain http from elsewhere
    page.locator(".answer .actions").get_by_role("button", name="Copy").click()
    page.wait_for_selector(".answer .actions button:has-text('Copied')")


def test_reload_keeps_the_conversation(page: Page) -> None:
    send(page, "hi")
    page.reload()
    assert page.inner_text(".bubble") == "hi"
    assert last_text(page).startswith("Hello, you!")
    page.wait_for_selector("#status.ready")
    send(page, "a long story", wait=False)
    until(page, "[...document.querySelectorAll('.answer > .text')].at(-1).innerText.length > 60")
    page.reload()
    assert len(last_text(page)) > 60
    assert "cut off when the page closed" in page.locator(".note").last.inner_text()


def test_a_tool_call_is_a_card_that_takes_a_result(page: Page) -> None:
    page.click("#settings-open")
    page.fill("#tools", "[{")
    assert "not JSON yet" in page.inner_text("#tools-problem")
    page.fill("#tools", TOOLS)
    assert page.inner_text("#tools-problem") == ""
    page.get_by_role("button", name="Done").click()
    assert page.inner_text("#tools-chip") == "1 tool"
    send(page, "what is the weather?")
    assert page.inner_text(".tool .name") == "get_weather"
    assert json.loads(page.inner_text(".tool code")) == {"city": "Lisbon", "days": 3}
    assert "\n" in page.inner_text(".tool code")
    with page.expect_request("**/chat/completions") as asked:
        page.get_by_label("Result of get_weather").fill("sunny all day")
        page.get_by_role("button", name="Send results").click()
    messages = asked.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[2]["tool_call_id"] == messages[1]["tool_calls"][0]["id"]
    assert messages[1]["reasoning_content"] == "I should look."
    finished(page)
    assert last_text(page) == "It is sunny in Lisbon."
    assert page.inner_text(".tool pre.result, .tool .result pre") == "sunny all day"


def test_settings_reach_the_request(page: Page) -> None:
    page.click("#settings-open")
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.4",
        "top_p": "0.9",
        "max_tokens": "50",
        "seed": "7",
    }.items():
        page.fill(f"#{name}", value)
    page.get_by_role("button", name="Done").click()
    page.select_option("#effort", "off")
    with page.expect_request("**/chat/completions") as asked:
        send(page, "hi")
    body = asked.value.post_data_json
    assert {"temperature": 0.4, "top_p": 0.9, "max_tokens": 50, "seed": 7}.items() <= body.items()
    assert body["thinking"] == {"type": "disabled"}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert last_text(page) == "Hello without thinking."
    page.reload()
    assert page.input_value("#effort") == "off"
    page.select_option("#effort", "max")
    page.wait_for_selector("#status.ready")
    with page.expect_request("**/chat/completions") as asked:
        send(page, "hi")
    assert asked.value.post_data_json["reasoning_effort"] == "max"


def test_colours_follow_the_system_and_the_button(open_page: Callable[..., Page]) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page = open_page(color_scheme="dark")
    dark = page.evaluate(paper)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    assert dark != light
    button = page.locator("#theme")
    assert button.get_attribute("aria-label") == "Colours: auto"
    button.click()
    button.click()
    assert (button.get_attribute("aria-label"), page.evaluate(paper)) == ("Colours: dark", dark)
    page.reload()
    assert page.evaluate(paper) == dark


def test_keyboard_alone_is_enough(open_page: Callable[..., Page]) -> None:
    page = open_page(reduced_motion="reduce")
    focus = "document.activeElement.id || document.activeElement.textContent"
    assert page.evaluate(focus) == "input"
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    finished(page)
    assert page.inner_text(".bubble") == "first line\nsecond line"
    page.keyboard.press("Control+,")
    assert page.is_visible("#settings")
    page.keyboard.press("Escape")
    assert not page.is_visible("#settings")
    assert page.evaluate(focus) == "input"
    seen = []
    for _ in range(40):  # Shift+Tab walks back over the answer's buttons, all of them visible when focused
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate(focus))
        if seen[-1] in ("Regenerate", "Edit"):
            assert page.evaluate("getComputedStyle(document.activeElement.closest('.actions')).opacity") == "1"
    assert {"Regenerate", "Edit", "settings-open", "new", "theme"} <= set(seen)
    page.keyboard.press("Control+Shift+O")
    assert (page.locator(".answer").count(), page.evaluate(focus)) == (0, "input")


def test_a_key_is_asked_for_and_kept_for_the_session(open_page: Callable[..., Page]) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "wrong key"}})

    page = open_page(route=("**/v1/chat/completions", guard))
    send(page, "hi", wait=False)
    page.wait_for_selector("#key:focus")
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.answer > .text')?.innerText.startsWith('Hello')")
    assert page.evaluate(
        "[JSON.parse(sessionStorage['pelagos.key']), JSON.stringify(localStorage).includes('sesame')]"
    ) == [
        "sesame",
        False,
    ]
    page.reload()
    page.wait_for_selector("#status.ready")
    send(page, "hi")
    assert last_text(page).startswith("Hello, you!")


def test_errors_are_told_and_can_be_tried_again(open_page: Callable[..., Page]) -> None:
    busy = {"status": 429, "headers": {"Retry-After": "3"}, "json": {"error": {"message": "2 of 2."}}}
    answers = iter([lambda route: route.fulfill(**busy), lambda route: route.abort()])
    page = open_page(route=("**/v1/chat/completions", lambda route: next(answers, lambda r: r.continue_())(route)))
    send(page, "hi")
    assert page.inner_text(".problem p") == "The server is busy. 2 of 2. Try again in 3 s."
    page.get_by_role("button", name="Try again").click()
    until(page, "document.querySelector('.problem p')?.innerText.startsWith('The server cannot be reached')")
    page.get_by_role("button", name="Try again").click()
    until(page, "document.querySelector('.answer > .text')?.innerText.startsWith('Hello')")
    finished(page)
    send(page, "break please")
    assert last_text(page) == "Half an ans"
    assert "the engine broke" in page.inner_text(".problem p")


def test_nothing_a_model_writes_is_executed(page: Page) -> None:
    page.click("#settings-open")
    page.fill("#tools", TOOLS)
    page.get_by_role("button", name="Done").click()
    send(page, f"evil {EVIL}")
    page.click(".thinking summary")
    for _ in range(2):
        page.wait_for_timeout(100)
        assert page.evaluate("window.hit") is None
        made = page.evaluate("[...document.querySelectorAll('#stage *')].map(node => node.localName)")
        assert not {"script", "iframe", "object", "embed", "b"} & set(made)
        assert page.locator("#turns img, #turns svg").count() == 0
        links = page.evaluate("[...document.querySelectorAll('#turns a')].map(node => [node.protocol, node.rel])")
        assert links == [["https:", "noopener noreferrer"]] * len(links)
        attributes = page.evaluate(
            "[...document.querySelectorAll('#turns *')].flatMap(node => node.getAttributeNames())"
        )
        assert not [name for name in attributes if name.startswith("on") or name in ("srcdoc", "style", "src")]
        assert "window.hit = 1" in page.inner_text(".answer > .text")
        assert "window.hit = 1" in page.inner_text(".tool code")
        page.reload()
        page.click(".thinking summary")


def test_conversations_are_renamed_deleted_and_come_back(page: Page, tmp_path: Path) -> None:
    for name in ("first", "second"):
        send(page, name)
        page.click("#new")
    titles = "[...document.querySelectorAll('#chats .open')].map(node => node.innerText)"
    assert page.evaluate(titles) == ["second", "first"]
    page.on("dialog", lambda dialog: dialog.accept("renamed"))
    page.hover("#chats li:last-child")
    page.get_by_role("button", name="Rename first").click()
    assert sorted(page.evaluate(titles)) == ["renamed", "second"]
    with page.expect_download() as download:
        page.click("#export")
    kept = tmp_path / "kept.json"
    download.value.save_as(kept)
    page.hover("#chats li:has-text('second')")
    page.get_by_role("button", name="Delete second").click()
    assert page.evaluate(titles) == ["renamed"]
    page.evaluate("localStorage.clear()")
    page.goto("/")
    page.reload()
    assert page.evaluate(titles) == []
    page.set_input_files("#file", kept)
    until(page, "document.querySelectorAll('#chats li').length === 2")
    page.click("#chats li:has-text('renamed') .open")
    assert last_text(page).startswith("Hello, you!")
    for wrong in (
        "[]",
        "{",
        '{"format": "pelagos-conversations", "conversations": [{"nodes": [{"role": "x", "parent": 3}]}]}',
    ):
        kept.write_text(wrong)
        page.set_input_files("#file", kept)
        until(page, "document.querySelector('#toast').innerText.includes('no export')")
        page.evaluate("document.querySelector('#toast').replaceChildren()")
    assert page.locator("#chats li").count() == 2


def test_full_and_damaged_storage_are_survived(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.evaluate(
        "localStorage.setItem('pelagos.chat.bad', '{\"nodes\": 3'); localStorage.setItem('pelagos.settings', '!')"
    )
    page.reload()
    page.wait_for_selector("#status.ready")
    page.evaluate("void (Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); })")
    send(page, "hi")
    assert "storage is full" in page.inner_text("#toast")
    assert last_text(page).startswith("Hello, you!")


MARKDOWN = {
    "# A *b*": "<h3>A <em>b</em></h3>",
    "a **b** ***c*** ~~d~~ `e<f` _g_ snake_case_name": "<p>a <strong>b</strong> <strong><em>c</em></strong> "
    "<del>d</del> <code>e&lt;f</code> <em>g</em> snake_case_name</p>",
    "*a **b** c* and 2 * 3 * 4 and \\*not\\*": "<p><em>a <strong>b</strong> c</em> and 2 * 3 * 4 and *not*</p>",
    "- a\n  - b\n    1. c\n- d": '<ul><li>a<ul><li>b<ol start="1"><li>c</li></ol></li></ul></li><li>d</li></ul>',
    "3. a\n\n   more\n4. b": '<ol start="3"><li><p>a</p><p>more</p></li><li>b</li></ol>',
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "a\n---\nb": "<p>a</p><hr><p>b</p>",
    "\\(a_1*b*c_2\\) costs $5 and $10": '<p><span class="math">\\(a_1*b*c_2\\)</span> costs $5 and $10</p>',
    "|a|b|\n|-|:-:|\n|1\\|2|**3**|": '<div class="table" tabindex="0"><table><thead><tr><th>a</th>'
    '<th class="center">b</th></tr></thead><tbody><tr><td>1|2</td>'
    '<td class="center"><strong>3</strong></td></tr></tbody></table></div>',
    "[a](javascript:x) ![b](data:x)": "<p><span>a</span> <span>b</span></p>",
}  # fmt: skip


def test_markdown_becomes_these_nodes(page: Page) -> None:
    render = """async (text) => {
        const { Markdown } = await import('/page/markdown.js'), view = new Markdown('');
        for (let end = 0; end <= text.length; end += 3) view.show(text.slice(0, end)); // as it streams
        view.show(text);
        return view.node.innerHTML;
    }"""
    for source, wanted in MARKDOWN.items():
        assert page.evaluate(render, source) == wanted
    code = page.evaluate(render, "1. a\n   ```py\n   x = '# no'  # yes\n\n   y\n   ```\n2. b\n\n```\nopen")
    assert code.count("<li>") == 2
    assert "<span class=\"s\">'# no'</span>" in code
    assert '<span class="c"># yes</span>\n\ny</code>' in code
    assert code.endswith("<code>open</code></pre></figure>")
    link = page.evaluate(render, "see https://a.example/x_(y), (https://c.example/z?) or [b](https://b.example).")
    wanted = ["https://a.example/x_(y)", "https://c.example/z", "https://b.example"]
    assert re.findall('href="([^"]+)"', link) == wanted


TAGS = set(
    "a blockquote button code del div em figcaption figure h3 h4 h5 h6 hr li ol p pre span strong table tbody td th "
    "thead tr ul".split()
)


def test_markdown_survives_anything_in_time(page: Page) -> None:
    found = page.evaluate("""async () => {
        const { Markdown } = await import('/page/markdown.js');
        const parts = ['*', '**', '_', '__', '`', '```', '~~',
            '[', '](', ')', '![', '<', '>', '|', '-', '\\n', '\\n\\n', '    ', '  ',
            '# ', '1. ', '- ', '> ', ':-', '\\\\', '$', '\\\\(', 'a', 'b c', 'https:',
             '//x.y', 'javascript:', '\\t', '&lt;', '\\u{1F600}', '"'];
        let seed = 7;
        const pick = (n) => (seed = (seed * 1103515245 + 12345) % 2147483648) % n;
        const tags = new Set(), names = new Set();
        for (let round = 0; round < 1500; round++) {
            const view = new Markdown('');
            let text = '';
            for (let part = 0; part < 40; part++) text += parts[pick(parts.length)];
            view.show(text.slice(0, pick(text.length)));
            view.show(text);
            const whole = new Markdown('');
            whole.show(text);
            if (whole.node.innerHTML !== view.node.innerHTML) return `differs when streamed: ${JSON.stringify(text)}`;
            for (const node of view.node.querySelectorAll('*')) {
                tags.add(node.localName);
                for (const name of node.getAttributeNames()) names.add(name);
            }
        }
        const slow = {};
        const long = ['*a ', '**a ', '[a', '[a](', '`a', '> - ', '|a', '_a', '$a', 'https:' + '//a.',
            '\\\\[', '***a* ', '- a\\n '];
        for (const unit of [...parts, ...long]) {
            const begun = performance.now();
            new Markdown('').show(unit.repeat(20000));
            if (performance.now() - begun > 2000) slow[unit] = performance.now() - begun;
        }
        return { tags: [...tags].sort(), names: [...names].sort(), slow };
    }""")
    assert isinstance(found, dict), found
    assert found["slow"] == {}
    assert set(found["tags"]) <= TAGS
    assert set(found["names"]) <= {"class", "href", "rel", "start", "tabindex", "target", "title", "type"}


def counters(second: int) -> dict[str, Any]:
    """Statistics of a busy engine, `second` seconds later."""
    rates = {
        "requests_done": 2, "steps": 30, "prompt_tokens": 900, "computed_tokens": 300, "cached_tokens": 600,
        "generated_tokens": 75, "drafted_tokens": 60, "accepted_drafts": 45,
    }  # fmt: skip
    rising = {name: rate * second for name, rate in rates.items()}
    fixed = {
        "requests_running": 7, "requests_waiting": 3, "preemptions": 1, "swaps": 1, "pages_total": 400,
        "pages_in_use": 130, "pages_cached": 200, "slots_total": 16, "slots_in_use": 7, "states_cached": 12,
        "state_bytes_cached": 5 << 20, "evicted_pages": 4, "evicted_states": 0,
    }  # fmt: skip
    more = {
        "disk": {"hits": 5, "misses": 2, "bytes": 1 << 21},
        "bytes_planned": {"weight_bytes": 24 << 20, "pages": 90},
    }
    return {"model": "nano", "uptime_seconds": 60 + second, "context_length": 4096, **rising, **fixed, **more}


def test_the_dashboard_draws_what_changes_and_pauses(open_page: Callable[..., Page]) -> None:
    ticks = itertools.count()
    page = open_page("/dashboard", route=("**/stats", lambda route: route.fulfill(json=counters(next(ticks)))))
    panel = page.locator(".panel", has=page.get_by_role("heading", name="Generated"))
    until(page, "document.querySelector('.spark').getAttribute('aria-label').endsWith('in 3 s')")
    assert 40 < float(panel.locator(".value").inner_text().split("tok")[0]) < 90
    assert panel.locator(".curve").get_attribute("d").count("L") == 2
    text = page.inner_text("main")
    for part in ("66.7 %", "75.0 %", "130of 400", "Queue", "2.0 MiB", "24.0 MiB", "1 preempted"):
        assert part in re.sub(r"(\d)\s+of", r"\1of", text), part
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    until(page, "document.querySelector('#status-text').innerText === 'paused'")
    page.wait_for_timeout(200)
    stood = next(ticks)
    page.wait_for_timeout(1300)
    assert next(ticks) == stood + 1
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_selector("#status.ready")


def test_the_dashboard_takes_the_key_of_the_chat(open_page: Callable[..., Page]) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.fulfill(json=counters(1))
        else:
            route.fulfill(status=401, json={"error": {"message": "no key"}})

    page = open_page("/")
    page.context.route("**/stats", guard)
    with page.expect_popup() as popup:
        page.get_by_role("link", name="Dashboard").click()
    popup.value.wait_for_selector("#status.lost")
    assert "wants an API key" in popup.value.inner_text("#status")
    page.click("#settings-open")
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    with page.expect_popup() as popup:
        page.get_by_role("link", name="Dashboard").click()
    popup.value.wait_for_selector("#status.ready")


def test_narrow_screens_need_no_sideways_scrolling(open_page: Callable[..., Page]) -> None:
    page = open_page(width=360)
    send(page, f"evil {'x' * 300}")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.querySelector('#log').scrollWidth <= document.querySelector('#log').clientWidth")
    assert not page.is_visible("#new")
    page.click("#side-open")
    page.wait_for_selector("#new:focus")
    page.keyboard.press("Escape")
    page.wait_for_selector("#new", state="hidden")
    page.goto("/dashboard")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.fixture(scope="module")
def axe() -> str:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, which says where axe-core is")
    root = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    source = Path(root) / "axe-core" / "axe.min.js"
    if not source.is_file():
        pytest.skip("axe-core is not installed (npm install -g axe-core)")
    return source.read_text(encoding="utf-8")


def violations(page: Page, axe: str) -> list[str]:
    page.evaluate(axe)
    found = page.evaluate("axe.run().then(({violations}) => violations)")
    return [f"{one['id']}: {node['target']} {node['failureSummary']}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_page: Callable[..., Page], axe: str, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    assert violations(page, axe) == []
    page.click("#settings-open")
    page.fill("#tools", TOOLS)
    assert violations(page, axe) == []
    page.get_by_role("button", name="Done").click()
    send(page, "hi")
    send(page, "break")
    send(page, "evil")
    page.locator(".thinking summary").last.click()
    send(page, "the weather")
    assert violations(page, axe) == []
    narrow = open_page(width=360, color_scheme=scheme)
    narrow.click("#side-open")
    narrow.wait_for_timeout(300)
    assert violations(narrow, axe) == []
    ticks = itertools.count()
    board = open_page(
        "/dashboard", color_scheme=scheme, route=("**/stats", lambda r: r.fulfill(json=counters(next(ticks))))
    )
    board.wait_for_timeout(1200)
    assert violations(board, axe) == []
