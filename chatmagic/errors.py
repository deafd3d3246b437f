"""The one exception family of the package, rendered in a notebook as a paragraph instead of a traceback."""

from traceback import clear_frames


class ChatmagicError(Exception):
    """What was wrong, what was found, what to type next.

    IPython calls `_render_traceback_` when a cell fails. The cell still fails, so nbval, papermill and
    `nbconvert --execute` see it; IPython's own UsageError would look like success to them.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def let_go(error: BaseException | None) -> None:
    """Take from the error, and from those that it came of, the frames of this package and what these called: a notebook
    keeps the last exception that it showed, and with it all that hangs on its frames."""
    while error is not None:
        outside, traceback = None, error.__traceback__
        while traceback and traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] != __package__:
            outside, traceback = traceback, traceback.tb_next
        clear_frames(traceback)  # not enough: a frame keeps its function, and that its closure
        if outside:
            outside.tb_next = None
        else:
            error.__traceback__ = None
        if error.__cause__ is not error.__context__:
            let_go(error.__cause__)
        error = error.__context__
