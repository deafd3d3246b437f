"""The page, in a headless Chromium. CHATMAGIC_REQUIRE_BROWSER=1 fails without a browser."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest

from chatmagic import build_messages, cli
from fake_model import FakeModel
from served import serving, until

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CHROMIUM = "/usr/bin/chromium"
ROOT = Path(__file__).parents[2]
ELSEWHERE = "class.example"  # a name that leads here, as a forwarded port's does


class Named(FakeModel):
    """Says its name and the question; notes which replies ended early."""

    def __init__(self, name):
        super().__init__(name=name, delay=0.01)
        self.broken_off = []

    def reply(self, turn, question):
        return f"{turn} {self.name}: {question}"

    def stream(self, messages, stats, **options):
        try:
            yield from super().stream(messages, stats, **options)
        except GeneratorExit:
            self.broken_off.append(messages[-1]["content"])
            raise


@pytest.fixture(scope="module")
def browser():
    if not (find_spec("playwright") and os.path.exists(CHROMIUM)):
        absent = pytest.fail if os.environ.get("CHATMAGIC_REQUIRE_BROWSER") else pytest.skip
        absent(f"playwright or {CHROMIUM} is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextmanager
def web(address, **environment):
    """The port of a page over the address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "chatmagic.cli", "web", address, "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/_stcore/health"), 120)
            yield port
        finally:
            process.terminate()
    assert not answers(f"http://127.0.0.1:{port}/_stcore/health")  # no process of its own is left


def answers(url):
    try:
        return urlopen(url, timeout=1).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def models():
    return Named("base"), Named("merged")


@pytest.fixture(scope="module")
def port(models):
    with serving(*models) as address, web(address) as port:
        yield port


@contextmanager
def visit(browser, url, **settings):
    """The page as a newcomer sees it."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, "locale": "zh-CN"} | settings)
    page = context.new_page()
    page.goto(url)
    yield page
    if picture := os.environ.get("CHATMAGIC_SCREENSHOT"):
        page.screenshot(path=picture)
    context.close()


def ask(page, text):
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill(text)
    box.press("Enter")


def replies(page):
    """The texts of all that was said."""
    return page.get_by_test_id("stChatMessage").all_inner_texts()


def done(page, count):
    """Waits until so much was said, and nobody speaks."""
    page.get_by_test_id("stChatInputSubmitButton").wait_for()
    page.wait_for_function("!document.body.innerText.includes('▌')")
    until(lambda: len(replies(page)) == count)


def test_two_models_answer_side_by_side_and_remember(browser, port, models):
    for model in models:
        model.asked.clear()
    with visit(browser, f"http://127.0.0.1:{port}") as page:
        ask(page, "你是谁")
        page.get_by_text("1 base: 你是谁", exact=True).wait_for()
        page.get_by_text("1 merged: 你是谁", exact=True).wait_for()
        done(page, 3)
        left, right = page.get_by_test_id("stColumn").all()
        assert left.bounding_box()["y"] == right.bounding_box()["y"]
        ask(page, "还有呢")
        page.get_by_text("2 merged: 还有呢", exact=True).wait_for()
        done(page, 6)
        for model in models:
            assert model.asked[-1][0] == build_messages("还有呢", [("你是谁", f"1 {model.name}: 你是谁")])
        page.get_by_text("新对话").click()
        until(lambda: replies(page) == [])
        page.get_by_label("系统提示").fill("be kind")
        ask(page, "again")
        page.get_by_text("1 merged: again", exact=True).wait_for()
        assert models[1].asked[-1][0] == build_messages("again", system="be kind")


def test_it_streams_and_stops(browser, port, models):
    """What was said until then stays, and is part of the conversation; the model is no longer busy."""
    base, merged = models
    with visit(browser, f"http://127.0.0.1:{port}", locale="en-US") as page:
        ask(page, "x" * 3000)
        page.get_by_text("1 base: xxxx").wait_for()
        first = len(page.get_by_text("1 base: xxxx").inner_text())
        until(lambda: len(page.get_by_text("1 base: xxxx").inner_text()) > first)
        page.get_by_test_id("stChatInputStopButton").click()
        until(lambda: base.broken_off == ["x" * 3000])
        asked = len(merged.asked)
        ask(page, "and now")
        page.get_by_text("2 base: and now", exact=True).wait_for()
        before = base.asked[-1][0][1]["content"]
        assert before.startswith("1 base: xxxx") and len(before) < 3000
        done(page, 6)
        assert len(merged.asked) == asked + 1 and merged.asked[-1][0] == build_messages("and now")


def test_a_phone_shows_one_below_the_other(browser, port):
    with visit(browser, f"http://127.0.0.1:{port}", viewport={"width": 360, "height": 740}) as page:
        ask(page, "`" + "a_long_name" * 20 + "`")
        done(page, 3)
        until(lambda: "1 merged" in replies(page)[-1])
        left, right = (each.bounding_box() for each in page.get_by_test_id("stColumn").all())
        assert right["y"] > left["y"] + left["height"] and right["x"] == left["x"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_an_address_where_nothing_answers_is_told(browser):
    with web("http://127.0.0.1:9/v1") as port, visit(browser, f"http://127.0.0.1:{port}") as page:
        page.get_by_text("does not answer: start it").wait_for()


def test_others_need_the_key(browser, port, models):
    with visit(browser, f"http://{ELSEWHERE}:{port}") as page:
        time.sleep(3)  # nothing comes, for Streamlit refuses another origin
        assert page.get_by_test_id("stChatInput").count() == 0
    with serving(*models, key="secret") as address:
        with web(address, CHATMAGIC_KEY="secret", CHATMAGIC_KEY_127_0_0_1="secret") as port:
            with visit(browser, f"http://{ELSEWHERE}:{port}") as page:
                box = page.get_by_label("CHATMAGIC_KEY")
                box.fill("wrong")
                box.press("Enter")
                time.sleep(1)
                assert page.get_by_test_id("stChatInput").count() == 0
                box.fill("secret")
                box.press("Enter")
                ask(page, "你好")
                page.get_by_text("1 merged: 你好", exact=True).wait_for()


def test_it_listens_to_others_with_a_key_alone(capsys, monkeypatch):
    monkeypatch.delenv("CHATMAGIC_KEY", raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it runs"))
    assert cli.main(["web", "--host", "0.0.0.0"]) == 1
    assert "export CHATMAGIC_KEY" in capsys.readouterr().err
