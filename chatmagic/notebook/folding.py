"""What a model thought, in a notebook: folded, apart from the words that follow it."""

from html import escape
from time import monotonic
from typing import TYPE_CHECKING

from IPython.display import DisplayHandle, display

from ..conversation.pieces import Thought
from ..conversation.printing import Printer, kernel, quoted, say, watched
from ..text import visible

if TYPE_CHECKING:
    from .display import Board

LOOK_EVERY = 0.5
"""Seconds between two looks at a thought that grows."""
STYLE = "white-space: pre-wrap; opacity: 0.7; border-left: 2px solid; padding-left: 1em"


class Folding:
    """Shows the thought of a reply in an output of its own: folded, its latest words if `live` and a person looks on,
    the whole once it has ended. All else goes to `words`."""

    def __init__(self, words: "Printer | Board", live: bool = True) -> None:
        self._words, self._live = words, live and watched()
        self._thought, self._looked = "", 0.0
        self._handle: DisplayHandle | None = None

    def __enter__(self) -> "Folding":
        self._words.__enter__()
        return self

    def __call__(self, piece: str) -> None:
        if type(piece) is not Thought:
            self._fold()
            return self._words(piece)
        self._thought += piece
        if self._live and monotonic() - self._looked >= LOOK_EVERY:
            latest = folded(self._thought, f"thinking: {' '.join(self._thought[-60:].split())}")
            if self._handle:
                self._handle.update(latest, raw=True)
            else:
                self._handle = display(latest, raw=True, display_id=True)
            self._looked = monotonic()

    def __exit__(self, *error: object) -> None:
        self._fold()
        self._words.__exit__(*error)

    def _fold(self) -> None:
        if not self._thought:
            return
        if self._handle:
            self._handle.update(folded(self._thought), raw=True)
        else:
            show_thought(self._thought)
        self._thought, self._handle = "", None


def show_thought(thought: str) -> None:
    """Show a whole one: folded, and in a terminal as a quotation."""
    if kernel():
        display(folded(thought), raw=True)
    else:
        say(f"> {quoted(thought.strip())}\n")


def folded(thought: str, latest: str | None = None) -> dict[str, str]:
    """The thought by MIME type, as HTML in which nothing of it is obeyed; with `latest` that alone is seen."""
    thought = visible(thought.strip())
    head = escape(visible(latest) if latest else f"thought, {len(thought)} characters")
    body = "" if latest else f'<div style="{STYLE}">{escape(thought)}</div>'
    return {
        "text/html": f"<details><summary>{head}</summary>{body}</details>",
        "text/plain": f"> {quoted(thought)}",
    }
