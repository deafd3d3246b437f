"""How far something is, and how long it still takes: a bar in a notebook, a line in a terminal."""

import sys
from html import escape
from io import StringIO
from typing import Any

from tqdm import tqdm

DELAY = 1.0
"""Seconds before a bar is shown: what is done by then needs none."""
TEXT = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]"
MARK = {"chatmagic": "progress"}
"""The metadata of such an output: who executes a notebook tells by it how far the cell is."""
ENDED = "{desc}: {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Bar(tqdm):  # type: ignore[misc]  # which brings no types
    """tqdm's own, with its arguments. In a kernel it is an output of the cell, in HTML that suits both themes, and no
    alarm on stderr; what its colour says its text says too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.handle: Any = None
        self.in_kernel = in_kernel()
        shown: dict[str, Any] = {"delay": DELAY}
        if self.in_kernel:
            shown["file"] = StringIO()
        elif not sys.stderr.isatty():
            shown["mininterval"] = 30  # a log gets a line now and then
        super().__init__(*args, **(shown | options))

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """tqdm's own name for drawing it."""
        if not self.in_kernel:
            return super().display(msg, pos)
        from IPython.display import display

        form = TEXT if self.total is None or self.n < self.total else ENDED
        text = self.format_meter(**(self.format_dict | {"ncols": None, "bar_format": form}))
        data = {"text/plain": text, "text/html": self._html(text)}
        if self.handle is None:
            self.handle = display(data, metadata=MARK, raw=True, display_id=True)
        else:
            self.handle.update(data, metadata=MARK, raw=True)
        return True

    def _html(self, text: str) -> str:
        part = min(100.0, 100 * self.n / self.total) if self.total else 0.0
        filled = f'<div style="width:{part:.0f}%;height:100%;background:#2da44e;border-radius:3px"></div>'
        track = "height:6px;max-width:24em;border-radius:3px;background:rgba(128,128,128,.3)"
        return f'<div style="font-size:90%">{escape(text)}<div style="{track}">{filled}</div></div>'


def in_kernel() -> bool:
    """Whether this is a notebook's kernel, whose outputs are shown as HTML."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
