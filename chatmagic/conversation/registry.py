"""Every ChatLLM that somebody holds, by name: where `%%chat` finds whom to ask."""

import sys
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from .llm import ChatLLM

registered: WeakValueDictionary[str, "ChatLLM"] = WeakValueDictionary()
"""The newest last: that one is active. Weak, so that deleting or replacing a reader's variable frees the GPU."""


def register(llm: "ChatLLM") -> None:
    """Make it the active one, in place of one of the same name, and in a notebook load the magics that ask it.

    The extension is asked for by the name that `%load_ext` takes: no module of the notebook's is imported here.
    """
    registered.pop(llm.name, None)
    registered[llm.name] = llm
    if (ipython := sys.modules.get("IPython")) and (shell := ipython.get_ipython()):
        shell.extension_manager.load_extension(__package__.partition(".")[0])
