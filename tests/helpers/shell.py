"""An IPython to type cells into."""

import pytest

from chatmagic import ChatmagicError


class Shell:
    """An IPython that runs cells, raises what they raise and returns what they print."""

    def __init__(self, ip, capsys):
        self.ip, self.capsys = ip, capsys

    def __call__(self, cell):
        self.capsys.readouterr()
        result = self.ip.run_cell(cell)
        self.printed = self.capsys.readouterr().out
        result.raise_error()
        self.result = result.result
        return self.printed

    def fails(self, cell, *words, kind=ChatmagicError):
        """The cell fails, shown as one paragraph that has all of `words` in it."""
        with pytest.raises(kind) as raised:
            self(cell)
        paragraph = self.printed.strip().split("\n")[-1]
        assert paragraph.startswith(raised.type.__name__ + ": ") and "Traceback" not in self.printed
        for word in words:
            assert word in paragraph
