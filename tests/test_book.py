"""The book, as `make docs` makes it: with no network and no warning, every page and public name in it, nothing from
another host, every link to something that is there, contents for readers of either language, and a search that finds
Chinese words."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import chatmagic.course

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path.relative_to(ROOT).with_suffix("")
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "notebooks/**/*.ipynb")
    for path in ROOT.glob(pattern)
    if ".ipynb_checkpoints" not in path.parts
]
FOR_BOTH = {"docs/template-list", "docs/terms", "docs/book/api", "CONTRIBUTING", "CHANGELOG"}
CHROMIUM = "/usr/bin/chromium"
OFFLINE = """
import sys

def stay(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError(f"the book would reach {arguments}")

sys.addaudithook(stay)
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    (line,) = [line for line in (ROOT / "Makefile").read_text("utf-8").splitlines() if "-m sphinx" in line]
    options = line.split("-m sphinx ")[1].removesuffix(" work/book").split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *options, folder], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


class Page(HTMLParser):
    """What a page loads, where it leads, and what can be led to."""

    def __init__(self, file):
        super().__init__()
        self.loads, self.links, self.names = [], [], set()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        has = dict(attributes)
        self.names |= {has[key] for key in ("id", "name") if has.get(key)}
        if tag == "a" and has.get("href"):
            self.links.append(has["href"])
        elif tag == "link" and has.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(has["href"])
        elif tag != "a" and has.get("src"):
            self.loads.append(has["src"])


@pytest.fixture(scope="module")
def pages(book):
    return {file: Page(file) for file in book.rglob("*.html")}


def spoken(page: str) -> str:
    """The language that a page is in."""
    if page in FOR_BOTH:
        return "both"
    return "en" if page.endswith(".en") or page.startswith("notebooks/en/") else "zh"


def contents(book: Path, page: str) -> set[str]:
    """The pages that the contents beside a page lead to."""
    _, _, tree = (book / f"{page}.html").read_text("utf-8").partition('<div class="sidebar-tree">')
    return {*re.findall(r'href="([^"#]+)\.html"', tree.partition("</aside>")[0])}


@pytest.mark.slow
def test_every_page_is_in_it_and_in_its_contents(book, pages):
    """Of each language, which those for both are in, too; and it leads to the other language."""
    assert len(PAGES) > 15 and {book / f"{page}.html" for page in PAGES} <= pages.keys()
    listed = {str(page) for page in PAGES} | {"docs/book/api"}
    for language, first, other in (("zh", "README", "README.en"), ("en", "README.en", "README")):
        theirs = {page for page in listed if spoken(page) in (language, "both")}
        assert contents(book, first) == theirs - {first} | {other}
    assert contents(book, "CHANGELOG") == listed - {"CHANGELOG"}


@pytest.mark.slow
def test_the_words_of_the_theme_are_in_the_language_of_the_page(book):
    for page in map(str, PAGES):
        language, search = ("zh-CN", "搜索") if spoken(page) == "zh" else ("en", "Search")
        said = (book / f"{page}.html").read_text("utf-8")
        assert re.search("<html[^>]*>", said)[0].count(f'lang="{language}"') == 1 and f'placeholder="{search}"' in said
        assert ("引入 ↓" in said, "imports ↓" in said) == (page == "docs/architecture", page == "docs/architecture.en")


@pytest.mark.slow
def test_nothing_comes_from_another_host(book, pages):
    assert [(file.name, each) for file, page in pages.items() for each in page.loads if urlsplit(each).netloc] == []
    styles = "".join(file.read_text("utf-8") for file in book.rglob("*.css"))
    assert re.findall(r"(?:@import\s+|url\()\s*[\"']?(?:https?:)?//[^\"')]+", styles) == []


@pytest.mark.slow
def test_every_link_leads_somewhere(book, pages):
    dead, checked = [], 0
    for file, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            checked += 1
            if not target.is_file():
                dead.append((file.name, link))
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in pages[target].names:
                dead.append((file.name, link))
    assert checked > 1000 and dead == []


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(book, pages):
    names = pages[book / "docs/book/api.html"].names
    public = {f"chatmagic.{name}" for name in chatmagic.__all__}
    public |= {f"chatmagic.course.{name}" for name in chatmagic.course.__all__ if name != "GB"}
    assert public - names == set()


@pytest.fixture(scope="module")
def browser():
    if not (find_spec("playwright") and os.path.exists(CHROMIUM)):
        reason = f"playwright or {CHROMIUM} is not installed"
        (pytest.fail if os.environ.get("CHATMAGIC_REQUIRE_BROWSER") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(
    "query, page",
    [
        ("双重量化", "notebooks/02-quantized-load"),
        ("过拟合", "notebooks/08-your-own-data"),
        ("overfitting", "notebooks/en/08-your-own-data"),
        ("merge_adapter", "api"),
    ],
)
def test_the_search_finds_words(book, browser, query, page):
    tab = browser.new_page()
    tab.goto(f"{(book / 'search.html').as_uri()}?q={query}")
    found = tab.locator("ul.search a")
    found.first.wait_for(timeout=20_000)
    assert any(page in link.get_attribute("href") for link in found.all())
    tab.close()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (600, "dark"), (400, "light")])
def test_no_page_is_wider_than_the_screen(book, browser, width, scheme):
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    wide, grounds = [], set()
    for page in PAGES:
        tab.goto((book / f"{page}.html").as_uri())
        if tab.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
            wide.append(str(page))
        grounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    tab.close()
    assert wide == [] and len(grounds) == 1
    assert all((sum(map(int, re.findall(r"\d+", ground)[:3])) < 384) == (scheme == "dark") for ground in grounds)
