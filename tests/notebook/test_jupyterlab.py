"""A reader in JupyterLab, by a headless Chromium: types `%%chat` cells, watches one stream, stops one.

CHATMAGIC_SCREENSHOT=FILE keeps a picture of the page; CHATMAGIC_REQUIRE_BROWSER=1 fails without a browser.
"""

import os
import re
import time
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lab import jupyterlab, wait

pytestmark = [pytest.mark.browser, pytest.mark.slow]
TESTS = Path(__file__).parents[1]
CHROMIUM = "/usr/bin/chromium"


def absent(what):
    (pytest.fail if os.environ.get("CHATMAGIC_REQUIRE_BROWSER") else pytest.skip)(f"{what} is not installed")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small):
    """The address of a notebook in a running JupyterLab, whose first cell has yet to be run."""
    if not find_spec("jupyterlab"):
        absent("JupyterLab")
    folder, settings = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings")
    setup = (
        "from chatmagic import ChatLLM, load_model, snapshot_download\n\n"
        'llm = ChatLLM(*load_model(snapshot_download("smollm2-135m")))'
    )
    cells = [new_markdown_cell("# Talk to a model"), new_code_cell(setup), new_code_cell("")]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "chat.ipynb")
    with jupyterlab(folder, settings, PYTHONWARNINGS="ignore", HF_HUB_DISABLE_PROGRESS_BARS="1") as address:
        yield f"{address}/lab/tree/chat.ipynb"


@pytest.fixture(scope="module")
def page(lab):
    if not (find_spec("playwright") and os.path.exists(CHROMIUM)):
        absent(f"playwright or {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(lab)
        page.get_by_text("| Idle").wait_for(timeout=120_000)
        yield Notebook(page)
        browser.close()


class Notebook:
    """A notebook on the page. A cell is typed into the last one, which running it renews."""

    def __init__(self, page):
        self.page = page
        self.cells = page.locator(".jp-Notebook .jp-CodeCell")
        self.last = self.cells.first

    def type(self, source):
        self.cells.last.locator(".cm-content").click()
        self.page.keyboard.insert_text(source)
        self.run(self.cells.count() - 1)

    def run(self, index):
        self.last = self.cells.nth(index)
        self.last.locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")

    @property
    def busy(self):
        return "*" in self.last.locator(".jp-InputPrompt").inner_text()

    @property
    def output(self):
        return "\n".join(self.last.locator(".jp-OutputArea-output").all_inner_texts())

    def finish(self, seconds=60):
        wait(
            lambda: re.search(r"\d", self.last.locator(".jp-InputPrompt").inner_text()),
            seconds,
            lambda: self.output,
        )
        return self.output

    def stop(self):
        self.page.locator('[data-command="notebook:interrupt-kernel"], [title^="Interrupt the kernel"]').first.click()


def test_a_reader_chats_stops_and_goes_on(page):
    page.run(0)
    assert "Error" not in page.finish()

    page.type("%%chat --greedy --max-new-tokens 40\nWhat is the capital of France? Tell me about it.")
    seen = []
    while page.busy or not seen:
        if page.output and page.output not in seen:
            seen.append(page.output)
    assert "Paris" in page.finish()
    assert len(seen) > 3 and all(page.output.startswith(text.rstrip()) for text in seen)

    page.type("%%chat --greedy --max-new-tokens 500\nWrite a long story about a lighthouse.")
    wait(lambda: len(page.output) > 20, 30)
    start = time.monotonic()
    page.stop()
    text = page.finish(10)
    assert time.monotonic() - start < 2  # the page's own round trip included
    assert re.search(r"Interrupted: stopped by you after \d+ tokens; the conversation is as it was before", text)
    assert len(text.partition("Interrupted:")[0]) > 20 and "Traceback" not in text

    page.type("%chat_history")
    table = page.finish()
    assert "Paris" in table and "lighthouse" not in table
    if path := os.environ.get("CHATMAGIC_SCREENSHOT"):
        page.page.screenshot(path=path)


def test_a_reply_cannot_run_script_in_the_page(page):
    page.type(
        "from fake_model import FakeModel\nevil = ChatLLM(FakeModel(), name='evil')\n"
        "evil.model.reply = lambda turn, question: "
        "'**bold** <script>window.hit = 1</script><img src=x onerror=\"window.hit = 1\"> ![p](/evil.png)'"
    )
    page.finish()
    asked = []
    page.page.on("request", lambda request: asked.append(request.url))
    for form in ("markdown", "text"):
        page.type(f"%%chat -m evil --format {form}\nhi")
        assert "<script>window.hit = 1</script><img src=x" in page.finish()
    assert page.cells.nth(page.cells.count() - 3).locator("strong").inner_text() == "bold"
    assert page.page.evaluate("window.hit") is None and not [url for url in asked if "evil.png" in url]


def fake(page, name, reply):
    """A model of that name that says what the Python expression `reply` comes to."""
    page.type(
        "from fake_model import FakeModel\n"
        f"{name} = ChatLLM(FakeModel(), name={name!r}, max_new_tokens=10**6)\n"
        f"{name}.model.reply = lambda turn, question: {reply}"
    )
    page.finish()


def test_quick_pieces_arrive_whole(page):
    """Above 1,000 messages a second a Jupyter server drops what comes."""
    fake(page, "quick", "''.join(f'{n:7}' for n in range(100_000 // 7)) + ' end'")
    page.type("%%chat -m quick\nhi")
    text = page.finish(120)
    assert text.split() == [*map(str, range(100_000 // 7)), "end"]


FORMULAS = r"""Inline $x_1 * y_1 * z_1$ and \(a_1 \{b\}\), **bold**, $5 or $6, `$HOME`:

$$
\begin{aligned}
a &= b_1 + c_1 \\
  &= d < e \\
- f &= g
\end{aligned}
$$

* \[ \frac{p}{q} \]

| a | b |
|---|---|
| $|x|$ | 2 |
"""


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_formulas_are_set_in_both_themes(page, theme):
    fake(page, "maths", repr(FORMULAS))
    page.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
    page.type(
        "print('before')\nget_ipython().run_cell_magic('chat', '-m maths --format markdown', 'hi')\nprint('after')"
    )
    text = page.finish()
    assert "before" in text and "after" in text and "$5 or $6" in text and "$HOME" in text
    output = page.last.locator(".jp-RenderedHTMLCommon")
    output.locator("mjx-container").nth(4).wait_for(timeout=20_000)
    assert output.locator("mjx-container").count() == 5 and output.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert output.locator("mjx-mtr").count() == 3  # the aligned rows
    assert output.locator("em").count() == 0 and output.locator("strong").inner_text() == "bold"
    colours = "e => getComputedStyle(e).color.match(/\\d+/g).slice(0, 3).map(Number)"
    wait(lambda: page.page.evaluate("document.body.dataset.jpThemeLight") == str("Light" in theme).lower(), 20)
    ink = sum(output.locator("mjx-container").first.evaluate(colours))
    assert ink < 300 if "Light" in theme else ink > 450
    if path := os.environ.get("CHATMAGIC_SCREENSHOT"):
        output.scroll_into_view_if_needed()
        page.page.screenshot(path=f"{path}-{theme.split()[1]}.png")
    page.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", "JupyterLab Light")


def test_cells_as_people_write_them(page):
    fake(page, "echo", "question")
    page.type("# a note\n#| echo: false\n%%chat -m echo\nhello")
    assert page.finish().strip() == "hello"
    page.type("%chat -m echo 你是谁?")
    assert "你是谁?" in page.finish()
    page.type("%%chat -m echo --code\n```python\nx = 41 + 1\n```")
    page.finish()
    page.page.get_by_text("x = 41 + 1", exact=True).last.wait_for(timeout=10_000)
    cells = [each.strip() for each in page.page.locator(".jp-CodeCell .cm-content").all_inner_texts()]
    assert cells.count("x = 41 + 1") == 1


def test_tab_completes_options(page):
    page.cells.last.locator(".cm-content").click()
    page.page.keyboard.press("Control+a")
    page.page.keyboard.insert_text("%%chat --te")
    page.page.keyboard.press("Tab")
    page.page.locator(".jp-Completer-item", has_text="--temperature").wait_for(timeout=10_000)
    page.page.keyboard.press("Enter")
    assert page.cells.last.locator(".cm-content").inner_text() == "%%chat --temperature"
    page.page.keyboard.press("Control+a")
    page.page.keyboard.press("Delete")  # the next test types here


def test_a_restarted_kernel_offers_the_conversation(page):
    fake(page, "talk", "question")
    page.type("%%chat -m talk\nremember me")
    page.finish()
    page.page.evaluate(
        "fetch('/api/kernels/' + jupyterapp.serviceManager.sessions.running().next().value.kernel.id + '/restart', "
        "{method: 'POST', headers: {'X-XSRFToken': document.cookie.match(/_xsrf=([^;]+)/)?.[1] ?? ''}})"
    )
    page.page.get_by_text("| Idle").wait_for(timeout=60_000)
    page.type(
        "from chatmagic import ChatLLM\nfrom fake_model import FakeModel\ntalk = ChatLLM(FakeModel(), name='talk')"
    )
    offer = "[talk: 1 rounds from before are kept; %chat_history load brings them back]"
    wait(lambda: offer in page.output, 30, lambda: page.output)  # it comes once the cell has its number
    page.type("%chat_history load")
    assert "remember me" in page.finish()
