"""The magics, typed into a testing shell and answered by a fake model."""

import sys

import pytest
from fake_model import FakeModel
from IPython.testing.globalipapp import start_ipython

from chatmagic import ChatLLM, ChatmagicError
from chatmagic.llm import models


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
        """The cell fails as one paragraph that has all of `words` in it."""
        with pytest.raises(kind):
            self(cell)
        assert "Traceback" not in self.printed and self.printed.count("\n\n") == 0
        for word in words:
            assert word in self.printed


@pytest.fixture(scope="module")
def ipython():
    return start_ipython() or sys.modules["IPython"].get_ipython()


@pytest.fixture
def run(ipython, capsys):
    models.clear()
    ipython.extension_manager.load_extension("chatmagic")
    yield Shell(ipython, capsys)
    ipython.reset()
    ipython.extension_manager.unload_extension("chatmagic")


@pytest.fixture
def fake():
    return FakeModel()


@pytest.fixture
def llm(run, fake):
    return ChatLLM(fake)


def test_cell_prints_the_reply_and_remembers_the_round(run, llm):
    assert run("%%chat\n你好") == "1: 你好\n"
    assert run("%%chat\nwho?\n") == "2: who?\n"
    assert llm.history == [("你好", "1: 你好"), ("who?", "2: who?")]
