"""What is shown: Markdown as HTML that cannot do anything, and tables of text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..text import visible, width

if TYPE_CHECKING:
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token
    from markdown_it.utils import OptionsDict


def render_markdown(text: str) -> str:
    """Markdown as HTML in which raw HTML is text and images are links: nothing in it runs or is loaded."""
    from markdown_it import MarkdownIt
    from markdown_it.common.utils import escapeHtml

    def image(self: "RendererHTML", tokens: Sequence["Token"], index: int, options: "OptionsDict", env: Any) -> str:
        source, alt = escapeHtml(tokens[index].attrs["src"]), escapeHtml(tokens[index].content)
        return f'<a href="{source}">{alt or source}</a>'

    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.add_render_rule("image", image)
    return markdown.render(text)


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
