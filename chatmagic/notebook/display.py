"""What is shown: Markdown as HTML that cannot do anything, in an output of its own, and tables of text."""

import re
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from IPython.display import DisplayHandle, display

from ..conversation.pieces import AllThought
from ..conversation.printing import PAUSE, watched
from ..conversation.reply import Reply
from ..text import visible, width
from .folding import folded

if TYPE_CHECKING:
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token
    from markdown_it.utils import OptionsDict

CODE = r"""(?P<code>
    ^[ ]{0,3}(?P<fence>`{3,}|~{3,}).*?(?:^[ ]{0,3}(?P=fence)[`~]*[ \t]*$|\Z)
  | (?P<tick>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=tick)(?!`))"""
MATH = re.compile(
    CODE
    + r"""
  | (?P<math>
        \$\$(?:(?!\n\s*\n|\$\$).)+\$\$
      | \\\[(?:(?!\n\s*\n).)+?\\\]
      | \\\((?:(?!\n\s*\n).)+?\\\)
      | \\begin\{(?P<name>\w+\*?)\}.+?\\end\{(?P=name)\}
      | (?<![A-Za-z$])\$(?![\s$])(?:(?!\n\s*\n)[^$\\`]|\\.)*?(?<!\s)\$(?![\d$]))
  | \\.""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
"""Formulas as MathJax finds them in a page, a price not being one; code, in which there are none; and escapes."""
ACTIVE = re.compile(CODE + r"|(?P<active>!\[|<(?=[A-Za-z/!?]))", re.MULTILINE | re.DOTALL | re.VERBOSE)
HIDDEN = "\ufdd0"  # no character, so that no text has a meaning with it


def render_markdown(text: str) -> str:
    """Markdown as HTML in which raw HTML is text and images are links: nothing in it runs or is loaded.

    Formulas between `$`, `$$`, `\\(`, `\\[` or in a LaTeX environment stay as they are, for the page's MathJax.
    """
    from markdown_it import MarkdownIt
    from markdown_it.common.utils import escapeHtml

    formulas: list[str] = []

    def hide(found: re.Match[str]) -> str:
        if not found["math"]:
            return found[0]
        formulas.append(escapeHtml(found[0]))
        return f"{HIDDEN}{len(formulas) - 1}{HIDDEN}"

    def image(self: "RendererHTML", tokens: Sequence["Token"], index: int, options: "OptionsDict", env: Any) -> str:
        source, alt = escapeHtml(str(tokens[index].attrs["src"])), escapeHtml(tokens[index].content)
        return f'<a href="{source}">{alt or source}</a>'

    def words(self: "RendererHTML", tokens: Sequence["Token"], index: int, options: "OptionsDict", env: Any) -> str:
        return escapeHtml(tokens[index].content).replace("$", "<span>$</span>")  # by itself, it begins no formula

    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.add_render_rule("image", image)
    markdown.add_render_rule("text", words)
    html = markdown.render(MATH.sub(hide, text.replace(HIDDEN, "\ufffd")))
    return re.sub(f"{HIDDEN}(\\d+){HIDDEN}", lambda found: formulas[int(found[1])], html)


def harmless_markdown(text: str) -> str:
    """The Markdown with its images as links, and raw HTML as text, for those who export it."""
    return ACTIVE.sub(lambda found: found[0] if found["code"] else f"\\{found[0]}", text)


class Board:
    """A reply in one output of a notebook: its pieces as they come, if `live` and somebody looks on, as text; and in
    the end, by `finish`, as HTML, with Markdown and text beside it for those who export the notebook."""

    def __init__(self, live: bool = True) -> None:
        self._live = live and watched()
        self._handle: DisplayHandle | None = None
        self._due, self._text, self._left = 0.0, "", False

    def __enter__(self) -> "Board":
        return self

    def __call__(self, piece: str) -> None:
        """Show a piece of text, not more often than the page can follow: each time all text is sent."""
        if not isinstance(piece, AllThought):
            self._text, self._left = self._text + piece, True
        elif self._text.strip():  # stays where it stands, and the words get an output below it
            self._show(folded(self._text))
            self._handle, self._text = None, ""
        if self._live and self._left and (now := monotonic()) >= self._due:
            self._due = now + PAUSE * max(1.0, len(self._text) / 10_000)
            self._show({"text/plain": visible(self._text)})

    def finish(self, reply: Reply) -> None:
        """Show the whole reply."""
        text = visible(reply)
        html = render_markdown(text)
        self._show({"text/html": html, "text/markdown": harmless_markdown(text), "text/plain": text})

    def __exit__(self, *error: object) -> None:
        if error[0] and self._left:
            self._show({"text/plain": visible(self._text)})

    def _show(self, bundle: dict[str, str]) -> None:
        self._left = False
        if self._handle:
            self._handle.update(bundle, raw=True)
        else:
            self._handle = display(bundle, raw=True, display_id=True)


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """Left-aligned columns, a row a line; long cells are cut, and a wide character takes two places."""
    rows = [heads, *[[brief(cell) for cell in row] for row in rows]]
    widths = [max(map(width, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell + " " * (wide - width(cell)) for cell, wide in zip(row, widths)).rstrip())


def brief(text: str) -> str:
    """The text in one line of at most 32 characters."""
    text = " ".join(visible(text).split())
    return text if len(text) <= 32 else text[:31] + "…"
