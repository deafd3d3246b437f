"""The book: `make docs` makes it of the repository's own pages and executed notebooks, with no network."""

import re
import sys
from collections.abc import Iterator
from gettext import NullTranslations
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from pygments.lexers import PythonLexer
from pygments.token import Name, String
from sphinx.application import Sphinx
from sphinx.locale import get_translator
from sphinx.search.zh import SearchChinese

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import chatmagic  # noqa: E402

project = "chatmagic"
author = "chatmagic"
release = version = chatmagic.__version__
language, html_search_language = "zh_CN", "zh"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "benchmarks/*.md", "notebooks/**.ipynb"]
exclude_patterns = ["**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = "chatmagic"
html_static_path, html_extra_path = ["static"], ["index.html"]
html_css_files, html_js_files = ["book.css"], ["search.js"]
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}
html_show_sphinx = html_show_copyright = html_copy_source = False
pygments_style, pygments_dark_style = "friendly", "monokai"

nb_execution_mode = "off"  # the notebooks come executed, by a real model
nb_merge_streams = True
nb_code_prompt_show = nb_code_prompt_hide = "答案 answer"  # of an exercise: a cell that is tagged hide-cell
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
default_role = "code"  # docstrings are read as they are in an editor: `name`
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

MANUAL = (
    "chat",
    "data",
    "training",
    "deploy",
    "models",
    "families",
    "templates",
    "autodl",
    "class",
    "reliability",
    "architecture",
)


def pages(*patterns: str) -> list[str]:
    """Sphinx' names of the pages that there are of these."""
    paths = [path.relative_to(ROOT) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path.with_suffix("").as_posix() for path in paths]


CHINESE, ENGLISH = (
    pages(*(f"docs/{name}{end}.md" for name in MANUAL), f"benchmarks/README{end}.md") for end in ("", ".en")
)
BOTH = [page for page in pages("docs/*.md") if page not in (*CHINESE, *ENGLISH)]
PARTS = {  # of the contents: whose they are, and the pages
    "教程": ("zh", pages("notebooks/*.ipynb")),
    "手册": ("zh", CHINESE),
    "English": ("zh en", ["README.en"]),
    "Course": ("en", pages("notebooks/en/*.ipynb")),
    "Manual": ("en", ENGLISH),
    "关于 About": ("zh en", [*BOTH, "docs/book/api", "CONTRIBUTING", "CHANGELOG"]),
    "中文": ("en", ["self"]),
}


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """The first page is the README; what lies beside it is for this site alone."""
    if docname == root_doc:
        for caption, (_, listed) in PARTS.items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *listed, "```", ""])


def in_one_language(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """The contents and the theme's own words are in the language of the page; a page for both has both contents."""
    whose = {each: whose for whose, listed in PARTS.values() for each in listed} | {"README": "zh", "README.en": "en"}
    spoken = whose.get(page, "zh en" if doctree else "zh")  # search and index are none of ours
    english, whole = spoken != "zh", context.get("toctree")
    app.builder.templates.environment.install_gettext_translations(NullTranslations() if english else get_translator())
    if english:
        context |= {"language": "en", "master_doc": "README.en"}

    def contents(**options: Any) -> str:
        """Sphinx' own, less the parts that are for readers of the other language."""
        captions = [caption for caption, (whose, _) in PARTS.items() if set(whose.split()) & set(spoken.split())]
        parts = re.split('(?=<p class="caption")', whole(**options))
        return "".join(part for part in parts if re.sub("<[^>]+>", "", part.partition("</p>")[0]).strip() in captions)

    if whole:
        context["toctree"] = contents


def as_rst(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are prose with `code` in it, not reStructuredText: what that would take for markup is escaped, and a
    line `name: ...`, or `name   ...`, begins an item of a list."""
    made, in_item = [], False
    for line in lines:
        parts = re.split("(`[^`]*`)", line)
        line = "".join(part if part[:1] == "`" else re.sub(r"([*|\\]|_\b)", r"\\\1", part) for part in parts)
        begins = re.match(r"([a-z_\\]+(?:, [a-z_\\]+)*)(?:: |  +)", line)
        in_item = bool(begins) or in_item and bool(line.strip())
        if begins:
            made += ["", f"- **{begins[1]}**: {line[begins.end() :]}"]
        elif in_item:
            made[-1] += " " + line.strip()
        else:
            made.append(line)
    lines[:] = made


class CellLexer(PythonLexer):
    """Python, but for a cell of `%%chat`, whose text is the reader's."""

    def get_tokens_unprocessed(self, text: str, stack: tuple[str, ...] = ("root",)) -> Iterator[tuple[int, Any, str]]:
        """pygments' own name for (place, kind, text) of each token."""
        if not text.startswith("%%chat"):
            yield from super().get_tokens_unprocessed(text, stack)
            return
        magic, _, said = text.partition("\n")
        yield 0, Name.Decorator, magic + "\n"
        yield len(magic) + 1, String, said


class Pairs(SearchChinese):
    """Chinese is indexed by pairs of characters, so that any word is found, in a dictionary or not: search.js."""

    language_name = "English"  # of the stemmer: "Chinese" has none (https://github.com/sphinx-doc/sphinx/issues/14229)

    def split(self, input: str) -> list[str]:
        """Sphinx' own name: what is indexed of a text."""
        runs = re.findall("[一-鿿]{2,}", input)
        words = self.latin1_letters.findall(input)
        self.latin_terms.update(words)
        return words + [run[at : at + 2] for run in runs for at in range(len(run) - 1)]


class Mermaid(Directive):
    """The picture of the floors without mermaid's JavaScript: a table, a row for each room that imports, a column for
    each that is imported. As all go downstairs, the marks stand above the diagonal but for those of dashed arrows."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """docutils' own name."""
        arrows = {}
        for start, arrow, ends in re.findall(r"^ *(\w+) (-->|-\.->) (.+)$", "\n".join(self.content), re.MULTILINE):
            arrows |= {(start, end): "○" if "." in arrow else "●" for end in ends.split(" & ")}
        above: dict[str, set[str]] = {}
        for (start, end), mark in arrows.items():
            above.setdefault(end, set()).update({start} if mark == "●" else ())
        rooms = [*TopologicalSorter(above).static_order()]
        rows = [
            f"<tr><th>{start}</th>" + "".join(f"<td>{arrows.get((start, end), '·')}</td>" for end in rooms) + "</tr>"
            for start in rooms
        ]
        english = self.state.document.settings.env.docname.endswith(".en")
        corner = "imports ↓ imported →" if english else "引入 ↓ 被引入 →"
        head = "".join(f"<th><span>{end}</span></th>" for end in rooms)
        table = f'<table class="rooms"><tr><td>{corner}</td>{head}</tr>{"".join(rows)}</table>'
        return [nodes.raw("", table, format="html")]


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("source-read", add_contents)
    app.connect("html-page-context", in_one_language, priority=400)  # before furo, which draws the contents
    app.connect("autodoc-process-docstring", as_rst)
    app.add_directive("mermaid", Mermaid)
    app.add_search_language(Pairs)
    app.add_lexer("python", CellLexer)
