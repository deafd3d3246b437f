"""Rows of JSON: one a line, or the elements of an array, or objects one after another."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from .encoding import undecodable
from .rows import CHUNK, FIRST_BYTES, DataError, NumberedRow

_DECODER = json.JSONDecoder(strict=False)  # a bare tab in a text is one
_NESTED = "not JSON that can be read: brackets within brackets, thousands deep."
_NO_SPACE = re.compile(r"[^ \t\r\n]")


def json_rows(file: BinaryIO, encoding: str, head: bytes) -> Iterator[NumberedRow]:
    """The rows of JSON that begins with `head`, each with the number of its line; a DataError in the place of one that
    cannot be read."""
    return (_lines if _is_lines(head, encoding) else _values)(file, encoding)


def _is_lines(head: bytes, encoding: str) -> bool:
    """Whether each line is a row by itself."""
    lines = head.split(b"\n")
    if len(lines) == 1:  # so long a line that its end is not seen: an array is read piece by piece
        return lines[0][:1] != b"[" or len(head) < FIRST_BYTES and not _whole(lines[0], encoding)
    if _whole(lines[0], encoding):
        return lines[0][:1] == b"{" or any(line.strip() for line in lines[1:])
    if _whole(lines[0].rstrip(b", \r"), encoding):  # with a comma too many
        return True
    if lines[0][:1] == b"[" or re.search(rb"[{\[,]\s*$", lines[0]):
        return False
    return any(line[:1] in b"{[" and _whole(line, encoding) for line in lines[1:] if line.strip()) or head[:1] != b"{"


def _whole(line: bytes, encoding: str) -> bool:
    """Whether it is JSON by itself."""
    try:
        return isinstance(_DECODER.decode(line.decode(encoding, "replace")), dict | list)
    except (ValueError, RecursionError):
        return False


def _lines(file: BinaryIO, encoding: str) -> Iterator[NumberedRow]:
    """A row a line. A line ends with a line feed and nothing else: U+2028 may stand in a text."""
    seen = False
    for number, raw in enumerate(file, 1):
        if raw.isspace():
            continue
        try:
            text = raw.decode(encoding)
            seen = seen or not raw.isascii()
            row = _DECODER.decode(text)
            if "\\u" in text:
                _check_halves(row, text)
        except UnicodeDecodeError as error:
            yield number, undecodable(error, encoding, seen)
        except json.JSONDecodeError as error:
            rest = error.doc[error.pos :].lstrip()
            if error.msg == "Extra data" and rest[:1] in ("{", "["):  # several on one line
                yield from ((number, row) for _, row in _values(io.BytesIO(text.encode()), "utf-8"))
            else:
                yield number, DataError(_explained(error))
        except (ValueError, RecursionError, DataError) as error:
            yield number, DataError(_NESTED if isinstance(error, RecursionError) else str(error))
        else:
            yield number, row


def _values(file: BinaryIO, encoding: str) -> Iterator[NumberedRow]:
    """The elements of a JSON array, or objects one after another, over however many lines, a chunk at a time."""
    decoder = codecs.getincrementaldecoder(encoding)()
    text, at, line, ended = "", 0, 1, False
    array = first = comma = due = False  # in an array; before its first; after a comma; where one is due
    talk: list[object] | None = None  # an array of messages
    opened = 1  # its line
    margin: str | None = ""  # what stands before a row on its line; None where that is another row

    def more() -> bool:
        """Whether there was more text to read."""
        nonlocal text, at, ended
        while not ended:
            chunk = file.read(max(CHUNK, len(text) - at))
            ended = not chunk
            if new := decoder.decode(chunk, final=ended):
                text, at = text[at:] + new, 0
                return True
        return False

    def advance(to: int, new_margin: str | None = None) -> None:
        nonlocal at, line, margin
        line += text.count("\n", at, to)
        at, margin = to, new_margin

    def next_beginning() -> bool:
        """Go to the next line that begins as this row's does, if it begins one and there is one."""
        if margin is None:
            return False
        mark, searched = f"\n{margin}{text[at]}", 0
        while (found := text.find(mark, at + searched)) < 0:
            searched = max(0, len(text) - at - len(mark))
            if not more():
                return False
        advance(found)
        return True

    def after_space() -> bool:
        """Go to what follows; False at the end of the file."""
        while not (found := _NO_SPACE.search(text, at)):
            if not more():
                return False
        if space := text[at : found.start()]:
            advance(found.start(), space.rpartition("\n")[2] if "\n" in space else margin)
        return True

    try:
        while after_space():
            char = text[at]
            if char == "[" and not array:
                array = first = True
                comma, due, talk, opened = False, False, None, line
                advance(at + 1)
            elif char == "]" and array:
                if comma:
                    yield line, DataError("not JSON: a trailing comma before the closing ']'. Remove it.")
                if talk:
                    yield opened, talk
                array = comma = due = False
                advance(at + 1)
            elif char == "," and array and due:
                comma, due = True, False
                advance(at + 1)
            else:
                try:
                    row, end = _DECODER.raw_decode(text, at)
                    if text.find("\\u", at, end) > 0:
                        _check_halves(row, text[at:end])
                except (ValueError, RecursionError, DataError) as error:
                    place, said = line, _NESTED if isinstance(error, RecursionError) else str(error)
                    if isinstance(error, json.JSONDecodeError):
                        if (error.pos >= len(text) - 12 or error.msg.startswith("Unterminated")) and more():
                            continue
                        place += text.count("\n", at, error.pos)
                        said = _explained(error)
                    yield place, DataError(said)
                    if not next_beginning():
                        return
                    comma = due = False
                    continue
                if array and first and _is_turn(row):
                    talk = []
                first, comma, due = False, False, True
                if talk is None:
                    yield line, row
                else:
                    talk.append(row)
                advance(end)
        if array:
            yield line, DataError("not JSON: the file ends before its array does. It was cut short.")
    except UnicodeDecodeError as error:
        line += text.count("\n", at) + error.object[: error.start].count(b"\n")
        yield line, undecodable(error, encoding, not text.isascii())


def _is_turn(row: object) -> bool:
    """Whether it is a message, so that the array that begins with it is one conversation."""
    keys = {key.lower() for key in row} if isinstance(row, dict) else set()
    return bool({"role", "from"} & keys and {"content", "value"} & keys)


def _check_halves(row: object, text: str) -> None:
    """Raise DataError for half an emoji, as a text has that was cut by its length; it cannot be encoded."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise DataError(f"half an emoji ({half}), as a text has that was cut in the middle. Remove it.") from None


def _explained(error: json.JSONDecodeError) -> str:
    """What is wrong with JSON, and what to do."""
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    place = f"column {error.colno}"
    if (before.endswith(",") and after[:1] in ("}", "]")) or re.match(r",\s*[}\]]", after):
        return f"not JSON: a trailing comma before the closing {after.lstrip(', ')[:1] or '}'!r} ({place}). Remove it."
    if error.msg == "Extra data" and after.startswith(","):
        return f"not JSON: a trailing comma after the row ({place}). Remove it, or put all rows between [ and ]."
    if after.startswith("'"):
        return f"not JSON: single quotes ({place}), as Python prints a dict. Write the file with json.dumps."
    if after.startswith(("None", "True", "False")):
        return f"not JSON: Python's {after[:5].strip(', ')} ({place}). Write the file with json.dumps."
    if after.startswith(("//", "/*", "#")):
        return f"not JSON: a comment ({place}). Remove it."
    if not after or error.msg.startswith("Unterminated"):
        return f"not JSON: it breaks off in the middle of a row ({error.msg}, {place}). The file may be cut short."
    return f"not JSON: {error.msg} ({place}), at {after[:20]!r}."
