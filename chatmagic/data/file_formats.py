"""Which format a file is in, told by its bytes, and the rows of it."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..text import nearest
from .encoding import decodable
from .json_rows import json_rows
from .rows import FIRST_BYTES, DataError, NumberedRow
from .tables import arrow_rows, csv_rows, excel_rows, parquet_rows

_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_REFUSED = {
    b"\xd0\xcf\x11\xe0": "an Excel file of before 2007. Save it as .xlsx",
    b"(\xb5/\xfd": "packed by zstd. Unpack it: zstd -d {name}",
    b"7z\xbc\xaf": "packed by 7-Zip. Unpack it: 7z x {name}",
    b"Rar!": "packed by RAR. Unpack it: unrar x {name}",
    b"%PDF": "a PDF. Copy its text into JSON lines",
    b"SQLite format 3": "a SQLite database. Export the table as CSV",
    b"version https://git-lfs": "a pointer of Git LFS; the data stayed on the server. Fetch it: git lfs pull",
    b"\x80\x04": "a Python pickle, which may run code when it is read. Save its rows as JSON lines",
    b"\x80\x05": "a Python pickle, which may run code when it is read. Save its rows as JSON lines",
    b"<": "a web page or XML. On GitHub and the hubs, download the raw file",
}


def existing(path: str | Path) -> Path:
    """The file of that name; DataError where there is none, with the nearest names."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        held = sorted(each.name for each in path.iterdir() if each.is_file())[:8]
        raise DataError(f"{path} is a folder; expected one file of it: {', '.join(held) or 'it holds none'}.")
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, names)
    there = f"beside it lie {', '.join(near)}" if near else f"in {path.parent} nothing has a like name"
    raise DataError(f"There is no file {path}; {there}.")


def read_rows(path: Path, encoding: str | None = None) -> Iterator[NumberedRow]:
    """The rows of a file, read as they are consumed. What the file is, its bytes say rather than its name's ending.

    A row that cannot be read comes as a DataError in its place; reading goes on after it where the next one's
    beginning can be told. Raises DataError where the file as a whole is none that can be read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(8)
        opened = next((open_ for sign, open_ in _PACKED.items() if magic.startswith(sign)), None)
        if magic[:4] == b"PAR1":
            yield from parquet_rows(path)
        elif magic[:6] == b"ARROW1" or magic[:4] == b"\xff\xff\xff\xff":
            yield from arrow_rows(path, streamed=magic[:1] == b"\xff")
        elif magic[:4] == b"PK\x03\x04":
            yield from excel_rows(path)
        else:
            with (opened or open)(path, "rb") as file:
                yield from _text_rows(path, file, encoding)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(f"{path.name} is packed and broken off, or damaged: {error}. Fetch it again.") from error


def _text_rows(path: Path, file: BinaryIO, encoding: str | None) -> Iterator[NumberedRow]:
    head = file.read(FIRST_BYTES)
    if not head:
        raise DataError(f"{path.name} is empty.")
    for sign, what in _REFUSED.items():
        if head.lstrip().startswith(sign):
            raise DataError(f"{path.name} is {what.format(name=path.name)}.")
    if head[257:262] == b"ustar":
        raise DataError(f"{path.name} is a tar archive. Unpack it: tar xf {path.name}")
    head, file, encoding = decodable(path.name, head, file, encoding)
    begin = head.lstrip()
    suffix = next((each for each in reversed(path.suffixes) if each.lower() not in (".gz", ".bz2", ".xz")), "").lower()
    if not begin:
        raise DataError(f"{path.name} is empty.")
    if suffix not in (".csv", ".tsv") and (begin[:1] in b"{[" or suffix.startswith(".json")):
        yield from json_rows(file, encoding, begin)
    elif suffix in (".csv", ".tsv") or suffix == ".txt" and b"\t" in begin.split(b"\n", 1)[0]:
        yield from csv_rows(io.TextIOWrapper(file, encoding, newline=""), path.name)
    else:
        start = begin[:30].decode(encoding, "replace")
        raise DataError(
            f"{path.name} is neither JSON nor a table: it begins with {start!r}. Expected JSON lines, a JSON array, "
            "CSV, Parquet or Excel."
        )
