"""A reply on its way to the reader: printed as it comes where a person sits, whole where a notebook is executed."""

import sys
from time import monotonic
from typing import Any

from ..text import visible
from .pieces import AllThought, Notice, Thought

PAUSE = 0.05
"""Seconds between two messages to a notebook. A Jupyter server drops what comes in more than 1,000 a second."""


def kernel() -> Any:
    """The kernel of the notebook that this runs in, None elsewhere."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None)


def watched() -> bool:
    """Whether a person may look on. Those who execute notebooks, nbclient (nbconvert, papermill, Quarto) and nbval, let
    no cell ask for input, and would store an output for each piece."""
    here = kernel()
    return here is None or here._allow_stdin


class Printer:
    """Prints the pieces of a reply that it is called with, a thought as a quotation, and ends the line when its block
    ends, however that ends."""

    def __enter__(self) -> "Printer":
        self._kernel, self._watched = kernel(), watched()
        self._held: list[str] = []
        self._last: str | None = None
        self._flushed = 0.0
        return self

    def __call__(self, piece: str) -> None:
        last, self._last = self._last, piece
        if isinstance(piece, AllThought):
            piece = "\n[what stands above was a thought]\n\n"
        elif isinstance(piece, Thought):
            piece = quoted(piece) if isinstance(last, Thought) else f"> {quoted(piece)}"
        elif type(last) is Thought and not isinstance(piece, Notice):
            piece = f"\n\n{piece}"
        if not self._watched:
            self._held.append(piece)
            return
        now = monotonic()
        # A kernel sends by itself, 0.2 s later, what is not flushed; a terminal may not.
        flush = self._kernel is None or now - self._flushed >= PAUSE
        emit(visible(piece), flush)
        if flush:
            self._flushed = now

    def __exit__(self, *error: object) -> None:
        if self._held:
            say("".join(self._held).removesuffix("\n" if isinstance(self._last, Notice) else ""))
        elif self._last is not None and not isinstance(self._last, Notice):  # which is a line of its own
            print()


def quoted(thought: str) -> str:
    """The lines after the first as Markdown and letters quote them."""
    return thought.replace("\n", "\n> ")


def say(text: str) -> None:
    """Print a whole text: in one write, so that no flush comes between it and the end of its line."""
    emit(visible(text) + "\n")


def emit(text: str, flush: bool = False) -> None:
    """Print the text as it is; what a console cannot encode that is not UTF-8 as \\u4f60, so that no reply is lost."""
    try:
        print(text, end="", flush=flush)
    except UnicodeEncodeError as error:
        print(text.encode(error.encoding, "backslashreplace").decode(error.encoding), end="", flush=flush)
