"""The encoding of a text file: as what it is read, and what bytes that are not in it may be."""

import codecs
import io
import re
from typing import Any, BinaryIO

from .rows import CHUNK, FIRST_BYTES, DataError


def decodable(name: str, head: bytes, file: BinaryIO, encoding: str | None) -> tuple[bytes, BinaryIO, str]:
    """(the first bytes of the text, the text from its beginning, its encoding), of a file of which `head` was read; a
    mark of the order of bytes is no part of the text, and UTF-16 and UTF-32 are read as UTF-8.

    Raises DataError for an encoding that is not known, and for UTF-16 and UTF-32 where `encoding` does not say so.
    """
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise DataError(f'No encoding is called {encoding!r}. Give "utf-8", "gbk", "utf-16" or another.') from None
    if encoding is None and (wide := _wide(head)):
        raise DataError(
            f"{name} is not UTF-8 but {wide[:6].upper()}, which Windows calls Unicode. Save it as UTF-8, "
            f'or pass encoding="{wide}".'
        )
    file, encoding = _rejoined(head, file), encoding or "utf-8"
    if re.match("utf[-_]?(16|32)", encoding, re.IGNORECASE):  # their line breaks are more than a byte
        recoded = _Recoded(file, encoding)
        head = recoded.read(FIRST_BYTES)
        file, encoding = _rejoined(head, recoded), "utf-8"
    if head.startswith(codecs.BOM_UTF8):
        file.read(3)
        head = head[3:]
    return head, file, encoding


class _Rest(io.RawIOBase):
    """`head`, then what is left of a file."""

    def __init__(self, head: bytes, file: "BinaryIO | _Recoded") -> None:
        self.head, self.file = head, file

    def readable(self) -> bool:
        """As io.RawIOBase asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        part = self.head[: len(buffer)] or self.file.read(len(buffer))
        self.head = self.head[len(part) :]
        buffer[: len(part)] = part
        return len(part)


def _rejoined(head: bytes, file: "BinaryIO | _Recoded") -> BinaryIO:
    return io.BufferedReader(_Rest(head, file), CHUNK)


class _Recoded:
    """Text of another encoding, as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.text = io.TextIOWrapper(file, encoding, newline="")

    def read(self, size: int) -> bytes:
        """So many bytes, roughly. Raises DataError where the file is not in that encoding."""
        try:
            return self.text.read(size // 4 or 1).encode("utf-8", "surrogatepass")
        except UnicodeError as error:
            raise DataError(f"The file is not {self.text.encoding}: {error}. Leave encoding= out to be told.") from None


def _wide(head: bytes) -> str | None:
    """The kind of UTF-16 or UTF-32, if that is what the bytes are."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) < len(head) / 8:
        return None
    return "utf-16-be" if even > odd else "utf-16-le"


_CHINESE = {*range(0xA1, 0xA4), *range(0xB0, 0xD8)}
_USUAL = {  # (in which core, the first bytes of the characters that texts in an encoding mostly consist of)
    "gbk": ("gb2312", _CHINESE),
    "gb18030": ("gb2312", _CHINESE),
    "big5": ("big5", {*range(0xA1, 0xC7)}),
    "shift_jis": ("shift_jis", {0x81, 0x82, 0x83, *range(0x88, 0x98)}),
    "cp1252": ("cp1252", {0x80, 0x85, *range(0x91, 0x98), 0xA0, 0xA1, 0xAB, 0xBB, 0xBF, *range(0xC0, 0x100)}),
}


def _usual(line: bytes, encoding: str) -> float:
    """The share of usual characters among those beyond ASCII in a line, if it is in that encoding; 0 if it is not."""
    core, first_bytes = _USUAL[encoding]
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(line)  # its end may be cut
    except UnicodeDecodeError:
        return 0.0
    beyond = [char.encode(core, "replace")[0] in first_bytes for char in text if char > "\x7f"]
    return sum(beyond) / len(beyond) if beyond else 0.0


def undecodable(error: UnicodeDecodeError, encoding: str, seen: bool) -> DataError:
    """What bytes that are no text in the encoding are. seen: some before were."""
    found = f"not {encoding.upper()} (byte 0x{error.object[error.start]:02x})"
    if encoding != "utf-8":
        return DataError(f"{found}. Leave encoding= out: then what it is, is looked for.")
    if seen:
        return DataError(f"{found}, though the lines before are: a character is cut in two. Mend or remove the line.")
    line = error.object[error.object.rfind(b"\n", 0, error.start) + 1 :].split(b"\n", 1)[0][:4000]
    name = max(_USUAL, key=lambda name: _usual(line, name))
    if _usual(line, name) > 0.5:
        return DataError(f'{found}; it looks like {name.upper()}. Save it as UTF-8 or pass encoding="{name}".')
    return DataError(f"{found}, nor any encoding that is known here. Save it as UTF-8.")
