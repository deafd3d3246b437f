"""Files of any kind to rows: JSON lines, JSON arrays and objects, tables; each row with the number of its line."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ChatmagicError
from ..text import nearest

CHUNK = 1 << 20  # bytes read at a time where a row may go over lines
HEAD = 1 << 16  # bytes that tell what a file is


class DataError(ChatmagicError):
    """A file or a batch that cannot be trained on."""


# (number of the line or row, what stands there, or why that cannot be read)
Row = tuple[int, object]

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
_DECODER = json.JSONDecoder(strict=False)  # a bare tab in a text is one


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


def read_rows(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """The rows of a file, read as they are consumed. What the file is, its bytes say rather than its name's ending.

    A row that cannot be read comes as a DataError in its place; reading goes on after it where the next one's
    beginning can be told. Raises DataError where the file as a whole is none that can be read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(8)
        opened = next((open_ for sign, open_ in _PACKED.items() if magic.startswith(sign)), None)
        if magic[:4] == b"PAR1":
            yield from _parquet(path)
        elif magic[:6] == b"ARROW1" or magic[:4] == b"\xff\xff\xff\xff":
            yield from _arrow(path, streamed=magic[:1] == b"\xff")
        elif magic[:4] == b"PK\x03\x04":
            yield from _excel(path)
        else:
            with (opened or open)(path, "rb") as file:
                yield from _text_rows(path, file, encoding)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(f"{path.name} is packed and broken off, or damaged: {error}. Fetch it again.") from error


def _text_rows(path: Path, file: BinaryIO, encoding: str | None) -> Iterator[Row]:
    head = file.read(HEAD)
    if not head:
        raise DataError(f"{path.name} is empty.")
    for sign, what in _REFUSED.items():
        if head.lstrip().startswith(sign):
            raise DataError(f"{path.name} is {what.format(name=path.name)}.")
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise DataError(f'No encoding is called {encoding!r}. Give "utf-8", "gbk", "utf-16" or another.') from None
    if head[257:262] == b"ustar":
        raise DataError(f"{path.name} is a tar archive. Unpack it: tar xf {path.name}")
    if encoding is None and (wide := _wide(head)):
        raise DataError(
            f"{path.name} is not UTF-8 but {wide[:6].upper()}, which Windows calls Unicode. Save it as UTF-8, "
            f'or pass encoding="{wide}".'
        )
    file, encoding = _rest(head, file), encoding or "utf-8"
    if re.match("utf[-_]?(16|32)", encoding, re.IGNORECASE):  # their line breaks are more than a byte
        recoded = _Recoded(file, encoding)
        head = recoded.read(HEAD)
        file, encoding = _rest(head, recoded), "utf-8"
    if head.startswith(codecs.BOM_UTF8):
        file.read(3)
        head = head[3:]
    begin = head.lstrip()
    suffix = next((each for each in reversed(path.suffixes) if each.lower() not in (".gz", ".bz2", ".xz")), "").lower()
    if not begin:
        raise DataError(f"{path.name} is empty.")
    if suffix not in (".csv", ".tsv") and (begin[:1] in b"{[" or suffix.startswith(".json")):
        yield from (_lines if _is_lines(begin, encoding) else _values)(file, encoding)
    elif suffix in (".csv", ".tsv") or suffix == ".txt" and b"\t" in begin.split(b"\n", 1)[0]:
        yield from _table(io.TextIOWrapper(file, encoding, newline=""), path.name)
    else:
        start = begin[:30].decode(encoding, "replace")
        raise DataError(
            f"{path.name} is neither JSON nor a table: it begins with {start!r}. Expected JSON lines, a JSON array, "
            "CSV, Parquet or Excel."
        )


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


def _rest(head: bytes, file: "BinaryIO | _Recoded") -> BinaryIO:
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


def _undecodable(error: UnicodeDecodeError, encoding: str, seen: bool) -> DataError:
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


def _is_lines(head: bytes, encoding: str) -> bool:
    """Whether each line is a row by itself."""
    lines = head.split(b"\n")
    if len(lines) == 1:  # so long a line that its end is not seen: an array is read piece by piece
        return lines[0][:1] != b"[" or len(head) < HEAD and not _whole(lines[0], encoding)
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


def _lines(file: BinaryIO, encoding: str) -> Iterator[Row]:
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
            yield number, _undecodable(error, encoding, seen)
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


_NESTED = "not JSON that can be read: brackets within brackets, thousands deep."
_NO_SPACE = re.compile(r"[^ \t\r\n]")


def _values(file: BinaryIO, encoding: str) -> Iterator[Row]:
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
        yield line, _undecodable(error, encoding, not text.isascii())


def _is_turn(row: object) -> bool:
    """Whether it is a message, so that the array that begins with it is one conversation."""
    keys = {key.lower() for key in row} if isinstance(row, dict) else set()
    return bool({"role", "from"} & keys and {"content", "value"} & keys)


def _table(file: io.TextIOWrapper, name: str) -> Iterator[Row]:
    """CSV, or with tabs or semicolons; the first line names the columns."""
    csv.field_size_limit(1 << 30)
    try:
        first = file.readline()
        said = re.fullmatch("sep=(.)", first.strip("\ufeff\r\n"))  # by Excel, for itself
        first = file.readline() if said else first
        delimiter = said[1] if said else max(",\t;", key=first.count)
        spaced = f"{delimiter} " in first
        lines = chain([first], file)
        reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
        before = bool(said)  # a line that the reader does not count
        _check_twice(name, reader.fieldnames or ())
        while True:
            begun = reader.line_num + before + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield begun, DataError(_not_csv(error, delimiter))
                continue
            if row is None:
                return
            if None in row:
                told = f"{len(row[None])} fields more than there are columns. A text with {delimiter!r} wants quotes."
                yield reader.line_num + before, DataError(told)
            else:
                yield reader.line_num + before, {key: value or None for key, value in row.items()}
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {_undecodable(error, file.encoding, False)}") from None


def _check_twice(name: str, columns: Iterable[object]) -> None:
    """Raise DataError for two columns of one name, of which the last would be read."""
    twice = [column for column, count in Counter(columns).items() if count > 1 and column not in (None, "")]
    if twice:
        raise DataError(f"{name} has more than one column that is called {twice[0]!r}. Rename or remove one.")


def _not_csv(error: csv.Error, delimiter: str) -> str:
    """What is wrong with a row of a table, and what to do."""
    if "unexpected end" in str(error):
        return "not CSV: a quote is opened in this row and never closed; what follows it is one text. Close it."
    if "expected after" in str(error):
        return f'not CSV: a quote inside a quoted text ({error}). Write it twice: "".'
    return f"not CSV: {error}."


@contextmanager
def _from_extra(name: str) -> Iterator[None]:
    """DataError with the way to what reads such a file, where it is not installed."""
    try:
        yield
    except ImportError:
        raise DataError(f"To read {name}: pip install 'chatmagic[data]'.") from None


def _parquet(path: Path) -> Iterator[Row]:
    with _from_extra(path.name):
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path, buffer_size=CHUNK) as file:
            batches = file.iter_batches(batch_size=256)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} is a Parquet file that is damaged: {error}. Fetch it again.") from error


def _arrow(path: Path, streamed: bool) -> Iterator[Row]:
    """A file of Arrow's, or a stream of it, as `datasets` saves."""
    with _from_extra(path.name):
        from pyarrow import ipc, memory_map
    try:
        with memory_map(str(path)) as source, (ipc.open_stream if streamed else ipc.open_file)(source) as file:
            batches = file if streamed else (file.get_batch(index) for index in range(file.num_record_batches))
            pieces = (batch.slice(at, 256) for batch in batches for at in range(0, batch.num_rows, 256))
            yield from enumerate((row for piece in pieces for row in piece.to_pylist()), 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} is an Arrow file that is damaged: {error}. Fetch it again.") from error


def _excel(path: Path) -> Iterator[Row]:
    """The first sheet; a second that holds anything is refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            held = archive.namelist()
    except zipfile.BadZipFile as error:
        raise DataError(f"{path.name} is packed and broken off, or damaged: {error}. Fetch it again.") from error
    if "xl/workbook.xml" not in held:
        raise DataError(f"{path.name} is a zip archive. Unpack it; it holds {', '.join(held[:5])}.")
    with _from_extra(path.name):
        from openpyxl import load_workbook
    book = load_workbook(path, read_only=True, data_only=True)
    try:
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # what some programs write there is too small
        filled = [sheet for sheet in book.worksheets if any(map(any, sheet.iter_rows(max_row=2, values_only=True)))]
        if len(filled) > 1:
            names = ", ".join(sheet.title for sheet in filled)
            raise DataError(f"{path.name} has more than one sheet ({names}). Save the one to read as CSV.")
        for sheet in filled:
            names, *_ = sheet.iter_rows(max_row=1, values_only=True)
            _check_twice(path.name, names)
            for number, row in enumerate(sheet.iter_rows(min_row=2, values_only=True), 2):
                if any(cell is not None for cell in row):
                    yield number, {str(name): cell for name, cell in zip(names, row) if name is not None}
    finally:
        book.close()
