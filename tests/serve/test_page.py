"""The chat page in a headless Chromium, against a small stand-in for the server that answers from a script.

Needs Python's playwright and a Chromium (the system's, or playwright's own); skipped where one is missing.
After every test: no request went to another host, nothing broke the Content-Security-Policy, the console is clean.
"""

import json
import os
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright, which is missing")
expect = playwright.expect

PAGE = Path(__file__).parents[2] / "pagoda" / "serve" / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SHOTS = os.environ.get("PAGODA_SHOTS")  # a folder for pictures of the page, to look at

MARKDOWN = """\
# Sorting a list

Quicksort **divides** the list at a *pivot*; it is `O(n log n)` on average, see
[the article](https://example.org/quicksort_(algorithm) "Quicksort").

1. Choose a pivot
   - the first, or
   - one by chance
     - with a seed
2. Divide, then sort both parts

| Algorithm | Average | Worst |
|:----------|:-------:|------:|
| Quicksort | n log n | n² |
| Mergesort | n log n | n log n |
| `a \\| b` | **n²** | n² |

```python
def quicksort(items: list[int]) -> list[int]:
    if len(items) < 2:
        return items
    pivot, *rest = items
    return quicksort([x for x in rest if x < pivot]) + [pivot] + quicksort([x for x in rest if x >= pivot])
```

> Premature optimisation is the root of all evil.

- [x] ~~bubbles~~
- [ ] heaps
"""
EVIL = """\
<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> <b>bold</b>

[click](javascript:window.hacked=1) [data](data:text/html,x) ![picture](https://evil.example/x.png)
[fine](https://fine.example/) [post](mailto:a@b.example) [sly](  JaVaScRiPt:window.hacked=1 )

<https://auto.example/"onmouseover="window.hacked=1>

| <img src=x onerror=window.hacked=1> |
|---|
| `<script>window.hacked=1</script>` |

```html"><img src=x onerror=window.hacked=1>
<img src=x onerror=window.hacked=1></code></pre><script>window.hacked=1</script>
```
"""
ANSWERS = {"markdown": MARKDOWN, "evil": EVIL, "long": "word " * 400, "lots": "several lines\n\n" * 60}


class StandIn(ThreadingHTTPServer):
    """Serves the page, and answers chats by their last message: its `ANSWERS`, else an echo with a running number."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.asked, self.broken = None, [], False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A reader who hangs up is no error."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, kind, body=b""):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status, message):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.send(status, "application/json", json.dumps({"error": error}).encode())

    def is_refused(self):
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.fail(401, "No such key.")
            return True
        return False

    def do_GET(self):
        if self.path == "/v1/models":
            if not self.is_refused():
                models = [{"id": name, "object": "model"} for name in ("smollm2-135m-instruct", "poet")]
                self.send(200, "application/json", json.dumps({"object": "list", "data": models}).encode())
            return
        file = PAGE / ("index.html" if self.path == "/" else self.path.removeprefix("/page/"))
        self.send(200, TYPES[file.suffix], file.read_bytes()) if file.is_file() else self.fail(404, "No such page.")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return
        self.server.asked.append(request)
        text = request["messages"][-1]["content"].split("\n")[-1]
        if self.server.broken:
            return self.fail(400, "The context is too long: 9000 tokens of 8192.")
        words = re.findall(r"\S+\s*|\s+", ANSWERS.get(text, f"Echo {len(self.server.asked)}: {text}"))
        self.send(200, "text/event-stream")
        for word in words:
            self.event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
            time.sleep(0.03 if text == "long" else 0.002)
            if text == "break" and word.startswith("break"):
                return self.event({"error": {"message": "Out of memory.", "type": "server_error"}})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 12, "completion_tokens": len(words), "total_tokens": 12 + len(words)}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data):
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as runner:
        if not (found or Path(runner.chromium.executable_path).exists()):
            pytest.skip("the page is tested in Chromium, which is missing")
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = runner.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture
def server():
    server = StandIn()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def start(browser, server):
    """Opens the page in a fresh browser profile, with the options of a playwright context."""
    contexts, seen = [], []

    def start(**options):
        context = browser.new_context(locale="en-GB", **options)
        contexts.append(context)
        context.set_default_timeout(5000)
        page = context.new_page()
        context.on("request", lambda request: seen.append(request.url))
        page.failures = []
        page.on("console", lambda line: page.failures.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.failures.append(str(error)))
        page.goto(server.url)
        return page

    yield start
    failures = [line for context in contexts for page in context.pages for line in getattr(page, "failures", [])]
    for context in contexts:
        context.close()
    assert [url for url in seen if not url.startswith((server.url, "blob:"))] == []
    assert failures == []


def ask(page, text, wait=True):
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    if wait:
        expect(page.get_by_label("Send")).to_be_visible()
        expect(answers(page).last.get_by_role("button", name="Regenerate")).to_be_visible()


def answers(page):
    return page.locator(".message.assistant")


def questions(page):
    return page.locator(".message.user .body")


def shoot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png")


def test_asks_and_shows_the_answer_with_its_speed(start, server):
    page = start()
    expect(page.get_by_label("Model").locator("option")).to_have_text(["smollm2-135m-instruct", "poet"])
    page.get_by_label("Model").select_option("poet")
    assert page.evaluate("document.querySelector('main').getBoundingClientRect().height") == 720  # beside the list
    shoot(page, "empty")
    ask(page, "hello there")
    expect(answers(page).locator(".body")).to_have_text("Echo 1: hello there")
    statistics = r"4 tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt 12 tokens"
    expect(answers(page).locator(".statistics")).to_have_text(re.compile(f"^{statistics}$"))
    expect(page.locator("#spoken")).to_have_text("Echo 1: hello there")
    (asked,) = server.asked
    assert asked == {
        "model": "poet",
        "messages": [{"role": "user", "content": "hello there"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    ask(page, "and more")
    assert [message["role"] for message in server.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_settings_go_with_the_request(start, server):
    page = start()
    page.get_by_role("button", name="Settings").click()
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 99, "seed": 7}
    for name, value in values.items():
        page.locator(f"#options [name={name}]").fill(str(value))
    page.get_by_label("System prompt").fill("You are terse.")
    shoot(page, "settings")
    page.keyboard.press("Escape")
    ask(page, "hello")
    assert {name: server.asked[0].get(name) for name in values} == values
    assert server.asked[0]["messages"][0] == {"role": "system", "content": "You are terse."}
    page.get_by_role("button", name="Settings").click()
    page.locator("[name=temperature]").fill("-1")  # outside the range: left to the server
    page.get_by_role("button", name="Done").click()
    ask(page, "again")
    assert "temperature" not in server.asked[1]
    assert server.asked[1]["seed"] == 7


def test_streams_and_stops_and_keeps_what_came(start):
    page = start()
    ask(page, "long", wait=False)
    expect(answers(page).locator(".body")).to_contain_text("word word")
    expect(answers(page).locator(".statistics")).to_have_text(re.compile(r"^≈ \d+ tokens · ≈ [\d.]+ tokens/s"))
    page.get_by_role("button", name="Stop").click()
    expect(answers(page).locator(".statistics")).to_contain_text("stopped")
    kept = answers(page).locator(".body").inner_text()
    assert 2 <= kept.count("word") < 400
    page.reload()
    expect(answers(page).locator(".body")).to_have_text(kept)


def test_a_reload_keeps_the_conversation_and_the_draft(start):
    page = start()
    ask(page, "hello")
    page.get_by_label("Your message").fill("half a thou")
    page.reload()
    expect(questions(page)).to_have_text(["hello"])
    expect(answers(page).locator(".body")).to_have_text(["Echo 1: hello"])
    expect(page.get_by_label("Your message")).to_have_value("half a thou")
    ask(page, "long", wait=False)
    expect(answers(page).last).to_contain_text("word word")
    page.reload()  # in the middle of an answer
    expect(answers(page).last).to_contain_text(re.compile("broken? off"))


def test_edits_a_question_and_makes_its_answer_anew(start, server):
    page = start()
    ask(page, "first")
    ask(page, "second")
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit your message").fill("better")
    page.keyboard.press("Escape")
    expect(questions(page)).to_have_text(["first", "second"])
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit your message").fill("better")
    page.keyboard.press("Enter")
    expect(answers(page).locator(".body")).to_have_text(["Echo 3: better"])
    expect(questions(page)).to_have_text(["better"])
    assert server.asked[2]["messages"] == [{"role": "user", "content": "better"}]


def test_regenerates_an_answer(start, server):
    page = start()
    ask(page, "first")
    ask(page, "second")
    page.get_by_role("button", name="Regenerate").first.click()
    expect(answers(page).locator(".body")).to_have_text(["Echo 3: first"])
    ask(page, "long", wait=False)
    expect(answers(page).last).to_contain_text("word word")
    page.get_by_role("button", name="Regenerate").first.click()  # while another answer comes
    expect(answers(page).locator(".body")).to_have_text(["Echo 5: first"])
    assert all(len(asked["messages"]) == n for asked, n in zip(server.asked, (1, 3, 1, 3, 1), strict=True))


def test_two_conversations_live_side_by_side(start, tmp_path):
    page = start()
    ask(page, "long", wait=False)
    expect(answers(page)).to_contain_text("word")
    page.get_by_role("link", name="New conversation").click()
    expect(questions(page)).to_have_count(0)
    ask(page, "A question about cats\nand dogs")
    names = page.locator("#conversations a")
    expect(names).to_have_text(["A question about cats", "long"])
    names.nth(1).click()
    expect(questions(page)).to_have_text(["long"])
    before = answers(page).locator(".body").inner_text()
    page.wait_for_timeout(100)
    assert len(answers(page).locator(".body").inner_text()) > len(before)  # it went on in the background
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Rename long").click()
    page.get_by_label("New title").fill("Words")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Words")
    page.reload()
    expect(names).to_contain_text(["Words", "A question about cats"])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "export.json")
    exported = json.loads((tmp_path / "export.json").read_text())
    assert download.value.suggested_filename == "Words.json"
    assert [message["role"] for message in exported["messages"]] == ["user", "assistant"]
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete Words").click()
    expect(names).to_have_text(["A question about cats"])
    page.reload()
    expect(names).to_have_text(["A question about cats"])


def test_markdown_becomes_elements(start):
    page = start(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "markdown")
    body = answers(page).locator(".body")
    expect(body.locator("h3")).to_have_text("Sorting a list")
    expect(body.locator("strong").first).to_have_text("divides")
    expect(body.locator("em").first).to_have_text("pivot")
    expect(body.locator("p code")).to_have_text("O(n log n)")
    link = body.get_by_role("link", name="the article")
    assert link.get_attribute("href") == "https://example.org/quicksort_(algorithm)"
    assert "noopener" in link.get_attribute("rel")
    expect(body.locator("ol > li")).to_have_count(2)
    expect(body.locator("ol > li > ul > li")).to_have_count(2)
    expect(body.locator("ol ul ul > li")).to_have_text(["with a seed"])
    expect(body.locator("th")).to_have_text(["Algorithm", "Average", "Worst"])
    expect(body.locator("tbody tr").last.locator("td")).to_have_text(["a | b", "n²", "n²"])
    expect(body.locator("blockquote")).to_have_text("Premature optimisation is the root of all evil.")
    expect(body.locator("del")).to_have_text("bubbles")
    expect(body.locator("figcaption")).to_contain_text("python")
    body.locator("figure").get_by_role("button", name="Copy").click()
    code = re.search(r"```python\n(.*?)\n```", MARKDOWN, re.DOTALL)[1]
    assert page.evaluate("navigator.clipboard.readText()") == code
    answers(page).locator(".actions").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN


# Markdown, and the HTML that it is to become (CommonMark and GitHub's, but line ends stay and headings begin at h3).
PIECES = {
    "a * b * c, 2*3 and snake_case_name": "<p>a * b * c, 2*3 and snake_case_name</p>",
    "***both*** **a *b* c** *a **b** c* __d__ _e_": (
        "<p><strong><em>both</em></strong> <strong>a <em>b</em> c</strong> <em>a <strong>b</strong> c</em> "
        "<strong>d</strong> <em>e</em></p>"
    ),
    "**`**kwargs`** and `` a`b ``": "<p><strong><code>**kwargs</code></strong> and <code>a`b</code></p>",
    r"\*not\* \<b> 1\. x": "<p>*not* &lt;b&gt; 1. x</p>",
    "one\ntwo<br>three": "<p>one<br>two<br>three</p>",
    "## Title ##\ntext": "<h4>Title</h4><p>text</p>",
    "1. a\n\n   more\n\n2. b\n- c": "<ol><li><p>a</p><p>more</p></li><li><p>b</p></li></ol><ul><li><p>c</p></li></ul>",
    "3. a\n  - b\n    - c\n4. d": (
        '<ol start="3"><li><p>a</p><ul><li><p>b</p><ul><li><p>c</p></li></ul></li></ul></li><li><p>d</p></li></ol>'
    ),
    "text\n- a\n\nend\n***\n> q\n> > r": (
        "<p>text</p><ul><li><p>a</p></li></ul><p>end</p><hr>"
        "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote>"
    ),
    "a | b\nc": "<p>a | b<br>c</p>",
    "[a](/etc) [b](ftp://x) [c]()": "<p>[a](/etc) [b](ftp://x) [c]()</p>",
}


def test_markdown_piece_by_piece(start):
    page = start()
    script = """async (texts) => {
      const { markdown } = await import("/page/markdown.js");
      return texts.map((text) => {
        const node = document.createElement("div");
        node.append(...markdown(text));
        return node.innerHTML;
      });
    }"""
    assert dict(zip(PIECES, page.evaluate(script, list(PIECES)), strict=True)) == PIECES


def test_markdown_shown_word_by_word_ends_as_shown_at_once(start):
    page = start()
    script = """async (text) => {
      const { markdown } = await import("/page/markdown.js");
      const { morph } = await import("/page/dom.js");
      const [grown, whole] = [document.createElement("div"), document.createElement("div")];
      for (let end = 0; end <= text.length; end++) morph(grown, markdown(text.slice(0, end)));
      whole.append(...markdown(text));
      return [grown.innerHTML, whole.innerHTML];
    }"""
    for text in (MARKDOWN, EVIL, *PIECES):
        grown, whole = page.evaluate(script, text)
        assert grown == whole


def test_degenerate_markdown_takes_no_time(start):
    page = start()
    script = """async (text) => {
      const { markdown } = await import("/page/markdown.js");
      const begun = performance.now();
      markdown(text);
      return performance.now() - begun;
    }"""
    runs = [
        "[",
        "*",
        "**a ",
        "_",
        "`",
        "` a",
        "~~",
        "> ",
        "- ",
        "1. ",
        "# ",
        "|",
        "|-",
        "!",
        "![",
        "](",
        "\\",
        "<",
        "(",
        "a_",
    ]
    runs += ["[a](", "[a](b ", "https://", "**`", "*a **b ", "\n- ", "\n", " ", "```\n", "a|b\n-|-\n", "  ", "\t- "]
    for run in runs:
        assert page.evaluate(script, "# a " + run * (16_000 // len(run)) + "x") < 3000, run
        assert page.evaluate(script, run * (16_000 // len(run)) + "x") < 3000, run


def test_what_a_model_writes_never_becomes_html(start):
    page = start()
    ask(page, "evil")
    body = answers(page).locator(".body")
    assert page.evaluate("window.hacked") is None
    expect(body.locator("img, script, b, iframe, [onerror], [onmouseover], [style]")).to_have_count(0)
    expect(body).to_contain_text('<img src=x onerror="window.hacked=1">')
    expect(body).to_contain_text("[click](javascript:window.hacked=1)")
    links = [link.get_attribute("href") for link in body.locator("a").all()]
    assert links[:3] == ["https://evil.example/x.png", "https://fine.example/", "mailto:a@b.example"]
    assert all(link.startswith(("https://", "mailto:")) for link in links)
    page.locator("#conversations a").click()
    ask(page, "<img src=x onerror=window.hacked=1>")  # as a question, and back as an answer
    expect(page.locator(".message img, .message script")).to_have_count(0)
    assert page.evaluate("window.hacked") is None


def test_errors_are_shown_and_nothing_is_lost(start, server):
    page = start()
    ask(page, "long", wait=False)
    expect(answers(page)).to_contain_text("word")
    ask(page, "break", wait=False)
    expect(answers(page)).to_have_count(1)  # Enter does not send while an answer comes; the text stays
    expect(page.get_by_label("Your message")).to_have_value("break")
    page.keyboard.press("Escape")
    expect(page.get_by_label("Send")).to_be_visible()
    page.keyboard.press("Enter")
    expect(answers(page).last.locator(".error")).to_have_text("Out of memory.")
    expect(answers(page).last.locator(".body")).to_have_text("Echo 2: break")
    server.broken = True
    ask(page, "too long", wait=False)
    expect(answers(page).last.locator(".error")).to_have_text("The context is too long: 9000 tokens of 8192.")
    expect(questions(page).last).to_have_text("too long")
    server.broken = False
    page.get_by_role("button", name="Try again").last.click()
    expect(answers(page).last.locator(".body")).to_have_text("Echo 4: too long")
    assert [line for line in page.failures if "400" not in line] == []
    page.failures.clear()


def test_says_when_the_server_is_gone(start, server):
    page = start()
    ask(page, "long", wait=False)
    expect(answers(page)).to_contain_text("word")
    page.keyboard.press("Escape")
    page.context.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    ask(page, "are you there", wait=False)
    expect(answers(page).last.locator(".error")).to_contain_text("Server not reachable")
    expect(questions(page).last).to_have_text("are you there")
    shoot(page, "error")
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("Server not reachable")
    page.get_by_label("Your message").fill("kept")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your message")).to_have_value("kept")
    page.context.unroute_all()
    page.get_by_role("button", name="Try again").last.click()
    expect(page.get_by_label("Model")).to_be_enabled()
    expect(page.get_by_role("alert")).to_be_hidden()
    assert [line for line in page.failures if "REFUSED" not in line] == []
    page.failures.clear()


def test_asks_for_a_key_only_when_the_server_does(start, server):
    page = start()
    expect(page.get_by_label("Model")).to_be_enabled()
    expect(page.get_by_label("API key")).to_be_hidden()
    server.key = "sesame"
    ask(page, "hello", wait=False)
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("does not accept this key")
    shoot(page, "key")
    page.get_by_label("API key").fill("sesame")
    page.keyboard.press("Enter")
    expect(answers(page).locator(".body")).to_have_text("Echo 1: hello")  # asked again by itself
    expect(page.get_by_label("API key")).to_be_hidden()
    page.reload()
    expect(page.get_by_label("Model")).to_be_enabled()
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
    assert [line for line in page.failures if "401" not in line] == []
    page.failures.clear()


def test_works_by_keyboard_alone(start):
    page = start()
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(questions(page)).to_have_text("one\ntwo")
    expect(answers(page).get_by_role("button", name="Regenerate")).to_be_visible()
    page.keyboard.type("long")
    page.keyboard.press("Enter")
    expect(answers(page).last).to_contain_text("word word")
    page.keyboard.press("Escape")
    expect(answers(page).last.locator(".statistics")).to_contain_text("stopped")
    page.get_by_role("link", name="Skip").focus()
    reached = ["Skip"]
    for _ in range(30):
        page.keyboard.press("Tab")
        focus = "document.activeElement.ariaLabel || document.activeElement.innerText"
        reached.append(page.evaluate(focus) or "")
        assert page.evaluate("document.activeElement.matches(':focus-visible')")
        if reached[-1] == "Send":
            break
    for name in ("Skip", "New conversation", "Rename one", "Delete one", "Colours", "Model", "Export", "Settings"):
        assert any(name in text for text in reached), (name, reached)
    for name in ("Edit", "Copy", "Regenerate", "Your message"):
        assert name in reached
    nameless = "[...document.querySelectorAll('button, input, select, textarea')].filter(x => x.checkVisibility())"
    nameless += ".filter(x => !(x.ariaLabel || x.innerText.trim() || x.labels?.length)).length"
    assert page.evaluate(nameless) == 0


def test_fits_a_phone(start):
    page = start(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2)
    ask(page, "markdown")
    page.wait_for_timeout(50)
    shoot(page, "phone-end")
    page.locator("#log").evaluate("log => log.scrollTop = 0")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("#log").evaluate("log => log.scrollWidth - log.clientWidth") == 0
    shoot(page, "phone")
    expect(page.get_by_role("link", name="New conversation")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    page.wait_for_timeout(250)
    shoot(page, "phone-drawer")
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_role("link", name="New conversation")).to_be_hidden()
    expect(questions(page)).to_have_count(0)
    page.get_by_role("button", name="Settings").click()
    shoot(page, "phone-settings")


def test_follows_the_systems_colours_and_the_switch(start):
    page = start(color_scheme="dark", viewport={"width": 1280, "height": 860})
    shade = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert page.evaluate(shade) < 60
    ask(page, "markdown")
    page.locator("#log").evaluate("log => log.scrollTop = 0")
    shoot(page, "desktop-dark")
    page.get_by_role("button", name="Colours of the system").click()
    assert page.evaluate(shade) > 200
    page.locator("#log").evaluate("log => log.scrollTop = 0")
    shoot(page, "desktop-light")
    page.reload()
    assert page.evaluate(shade) > 200
    page.get_by_role("button", name="Light").click()
    assert page.evaluate(shade) < 60


def test_scrolls_along_only_while_the_reader_is_at_the_end(start):
    page = start()
    at_end = "log => log.scrollHeight - log.scrollTop - log.clientHeight < 2"
    ask(page, "lots")
    assert page.locator("#log").evaluate(at_end)
    ask(page, "lots", wait=False)
    expect(answers(page).last).to_contain_text("several")
    page.locator("#log").evaluate("log => log.scrollTop = 0")
    expect(answers(page).last.get_by_role("button", name="Regenerate")).to_be_visible()
    assert page.locator("#log").evaluate("log => log.scrollTop") == 0
