"""The one exception family of the package, rendered in a notebook as a paragraph instead of a traceback."""


class ChatmagicError(Exception):
    """What was wrong, what was found, what to type next.

    IPython calls `_render_traceback_` when a cell fails. The cell still fails, so nbval, papermill and
    `nbconvert --execute` see it; IPython's own UsageError would look like success to them.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
