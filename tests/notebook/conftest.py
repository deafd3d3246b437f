"""A testing shell with the magics loaded, and a fake model that answers them."""

import sys

import pytest
from IPython.testing.globalipapp import start_ipython

from chatmagic import ChatLLM
from chatmagic.conversation.registry import registered
from fake_model import FakeModel
from shell import Shell


@pytest.fixture(scope="module")
def ipython():
    return start_ipython() or sys.modules["IPython"].get_ipython()


@pytest.fixture
def run(ipython, capsys):
    registered.clear()
    ipython.extension_manager.load_extension("chatmagic")
    yield Shell(ipython, capsys)
    ipython.reset()
    ipython.config.pop("ChatMagics", None)
    ipython.extension_manager.unload_extension("chatmagic")


@pytest.fixture
def fake():
    return FakeModel()


@pytest.fixture
def llm(run, fake):
    return ChatLLM(fake)
