"""What goes with a question beyond its words: files, outputs of cells, and the last error with its cell."""

import linecache
import re
import traceback
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell

from ..errors import ChatmagicError
from ..text import nearest

EXPLAIN = {
    "zh": "这个单元格出错了。说明原因，并给出改好的代码。",
    "en": "This cell failed. Say why, and give the code that is right.",
}
FRAMES = 4  # of a traceback that are shown from its beginning, and as many from its end


def read(path: str) -> str:
    """The text of a file, in UTF-8 or GB 18030. Raises ChatmagicError where there is none."""
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
    except OSError as error:
        names = [each.name for each in file.parent.iterdir()] if file.parent.is_dir() else []
        near = f"; beside it lies {', '.join(found)}" if (found := nearest(file.name, names)) else ""
        raise ChatmagicError(f"{path} cannot be read: {error.strerror}{near}") from None
    for encoding in ("utf-8-sig", "gb18030"):
        if b"\0" not in content:
            try:
                return content.decode(encoding)
            except UnicodeDecodeError:
                continue
    raise ChatmagicError(f"{path} is no text in UTF-8 or GB 18030: save its text as a .txt or .md file")


def output(shell: InteractiveShell, number: int) -> str:
    """What the cell that ran as [number] printed and showed, as text. Raises ChatmagicError where it did neither."""
    bundles = [each.bundle for each in shell.history_manager.outputs.get(number, [])]
    texts = ["".join(bundle.get("stream", bundle.get("text/plain", ""))) for bundle in bundles]
    if not (text := "\n".join(filter(None, (each.rstrip("\n") for each in texts)))):
        if number not in shell.user_ns.get("Out", {}):
            raise ChatmagicError(f"the cell [{number}] has no output to send, or has not been run in this kernel")
        text = str(shell.user_ns["Out"][number])
    return text


def attach(name: str, text: str) -> str:
    """A text as Markdown that a model can tell from the question."""
    fence = max(re.findall(r"`+", text), key=len, default="")
    fence = "`" * max(3, len(fence) + 1)
    return f"{name}:\n\n{fence}\n{text.strip(chr(10))}\n{fence}\n\n"


def explain(asked: str) -> str:
    """The question about an error, in the language of what was asked before: Chinese, unless that was without any."""
    return EXPLAIN["en" if asked and not re.search("[一-鿿]", asked) else "zh"]


def told(error: BaseException, cell: str | None = None) -> str:
    """A cell, by default that where the error began, and the error: the places that it came through, if they are many
    the first and the last of them, without those of IPython."""
    found = traceback.TracebackException.from_exception(error)
    places = [place for place in found.stack if not re.search(r"[\\/]IPython[\\/]", place.filename)]
    if cell is None and places:
        cell = "".join(linecache.getlines(places[0].filename))
    if len(places) > 2 * FRAMES:
        places = places[:FRAMES] + places[-FRAMES:]
    found.stack = traceback.StackSummary.from_list(places)
    return attach("cell", cell or "") + attach("error", "".join(found.format(chain=False)))
