"""What a model answered before and after, side by side: a table in a notebook, lines in a terminal."""

import re
from difflib import SequenceMatcher
from html import escape
from textwrap import indent

from ..text import visible

COLUMNS = {"": 4, "问题 question": 22, "训练前 before": 36, "训练后 after": 38}  # and how wide, in %
CELL_STYLE = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere;padding:.4em .6em;"
NEW = "text-decoration:none;border-radius:3px;background:rgba(46,160,67,.28)"  # seen on white and on black
ALIKE = 0.5  # a reply of which less has stayed is new as a whole


def before_after(before: dict[str, str], after: dict[str, str]) -> "Comparison":
    """The table of two sets of replies, `before` and `after`, to the same questions, {question: reply} each."""
    return Comparison([(question, before[question], after[question]) for question in before])


class Comparison:
    """Rows of (question, reply before, reply after), every one whole. A row whose reply changed begins with ≠, and what
    is new in it stands in `<ins>`: where a page takes the colours away, the marks stay."""

    def __init__(self, rows: list[tuple[str, str, str]]) -> None:
        self.rows = rows

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="{CELL_STYLE}width:{part}%">{title}</th>' for title, part in COLUMNS.items())
        rows = "".join(
            "<tr>" + "".join(f'<td style="{CELL_STYLE}">{cell}</td>' for cell in self._cells(*row)) + "</tr>"
            for row in self.rows
        )
        return (
            f'<table style="width:100%;table-layout:auto"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        )

    def _cells(self, question: str, before: str, after: str) -> tuple[str, str, str, str]:
        mark = "=" if before == after else "<b>≠</b>"
        return mark, escape(visible(question)), escape(visible(before)), marked(visible(before), visible(after))

    def __repr__(self) -> str:
        lines = []
        for question, before, after in self.rows:
            lines.append(f"{'=' if before == after else '≠'} {visible(question)}")
            said = {"both": after} if before == after else {"before": before, "after": after}
            for when, reply in said.items():
                lines.append(f"    {when:8}" + indent(visible(reply), " " * 12).strip())
        return "\n".join(lines)


def marked(before: str, after: str) -> str:
    """The reply `after` as HTML, what `before` did not say in `<ins>`."""
    if before == after:
        return escape(after)
    old, new = (re.findall(r"[一-鿿]|[^\W一-鿿]+|\s+|.", text, re.DOTALL) for text in (before, after))
    matched = SequenceMatcher(None, old, new, autojunk=False)
    blocks = matched.get_matching_blocks() if matched.ratio() >= ALIKE else [(0, len(new), 0)]
    parts, at = [], 0
    for _, start, size in blocks:
        if start > at:
            parts.append(f'<ins style="{NEW}">{escape("".join(new[at:start]))}</ins>')
        parts.append(escape("".join(new[start : start + size])))
        at = start + size
    return "".join(parts)
