"""Conversations outside the kernel: one as a Markdown file, and what a kernel that is gone leaves to the next."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote
from weakref import WeakKeyDictionary

from IPython.core.interactiveshell import InteractiveShell

from ..conversation.llm import ChatLLM
from ..conversation.printing import say, watched
from ..conversation.reply import FENCE
from ..errors import ChatmagicError
from ..files import make_folder, remove, write
from ..machine import courses
from ..text import mend, visible
from .display import harmless_markdown

TITLE = "# Conversation with "


def export_markdown(llm: ChatLLM, path: str) -> None:
    """Write the conversation as Markdown: questions quoted, replies as they are, except that nothing in them is loaded.

    Raises ChatmagicError, and leaves what is there, for a file that is no such conversation.
    """
    file = Path(path).expanduser()
    if file.is_file() and not file.read_bytes().startswith(TITLE.encode()):
        raise ChatmagicError(f"{path} holds something else, and is not written over: name another file")
    parts = [f"{TITLE}{llm.name}"]
    if llm.system:
        parts.append(_quoted(llm.system))
    for number, (query, reply) in enumerate(llm.history, 1):
        parts += [f"## {number}", _quoted(query), _closed(harmless_markdown(reply))]
    write(file, visible(mend("\n\n".join(parts))) + "\n")


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def _closed(text: str) -> str:
    """The Markdown, its last fence closed if the reply was cut in it."""
    *_, last = ["", *(found for found in FENCE.finditer(text))]
    cut = last and last.end() == len(text) and not text.rstrip().endswith(last["fence"])
    return f"{text}\n{last['fence']}" if cut else text


class Autosave:
    """Keeps what the models of a notebook were asked, so that a kernel that restarts can go on.

    `NAME.jsonl` is of this kernel, `NAME.before.jsonl` of the one before. Only where a person looks on, and the
    notebook has a name: JupyterLab and VS Code tell it.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell, self._started_in = shell, os.getcwd()
        self._seen: WeakKeyDictionary[ChatLLM, list[tuple[str, str]]] = WeakKeyDictionary()

    def before(self, llm: ChatLLM) -> Path | None:
        """The file of the conversation that an earlier kernel had with a model of that name, if there is one."""
        file = (folder := self._folder()) and folder / f"{quote(llm.name, safe='')}.before.jsonl"
        return file if file and file.is_file() else None

    def look(self, models: Iterable[ChatLLM]) -> None:
        """After a cell: save what has changed; offer what there is for a model that is new. What cannot be saved, or
        read, fails no cell."""
        if not watched() or not (folder := self._folder()):
            return
        with suppress(ChatmagicError, OSError):
            for llm in models:
                now = folder / f"{quote(llm.name, safe='')}.jsonl"
                if llm not in self._seen:
                    if now.is_file():
                        write(now.with_suffix(".before.jsonl"), now.read_bytes())
                        remove(now)
                    self._seen[llm] = []
                    if not llm.history and (kept := self.before(llm)):
                        rounds = kept.read_text("utf-8").count('"role": "assistant"')
                        say(f"[{llm.name}: {rounds} rounds from before are kept; %chat_history load brings them back]")
                if llm.history != self._seen[llm]:
                    self._seen[llm] = list(llm.history)
                    make_folder(folder)
                    llm.save(now) if llm.history else remove(now)

    def _folder(self) -> Path | None:
        named = os.environ.get("JPY_SESSION_NAME") or self._shell.user_ns.get("__vsc_ipynb_file__")
        if not named:
            return None
        digest = hashlib.sha256(os.path.join(self._started_in, str(named)).encode(errors="replace")).hexdigest()
        return courses() / ".conversations" / digest[:16]
