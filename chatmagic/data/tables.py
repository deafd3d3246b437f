"""Rows of tables: CSV, Excel, Parquet and Arrow."""

import csv
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from .encoding import undecodable
from .rows import CHUNK, DataError, NumberedRow


def csv_rows(file: io.TextIOWrapper, name: str) -> Iterator[NumberedRow]:
    """The rows of CSV, also with tabs or semicolons; the first line names the columns. Raises DataError where two have
    one name, or the file is not in its encoding."""
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
        raise DataError(f"{name}: {undecodable(error, file.encoding, False)}") from None


def _not_csv(error: csv.Error, delimiter: str) -> str:
    """What is wrong with a row of a table, and what to do."""
    if "unexpected end" in str(error):
        return "not CSV: a quote is opened in this row and never closed; what follows it is one text. Close it."
    if "expected after" in str(error):
        return f'not CSV: a quote inside a quoted text ({error}). Write it twice: "".'
    return f"not CSV: {error}."


def excel_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of the first sheet. Raises DataError where a second holds anything, where two columns have one name,
    where it is damaged or no workbook, or openpyxl missing."""
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


def parquet_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of a Parquet file, numbered from 1. Raises DataError where it is damaged, or pyarrow missing."""
    with _from_extra(path.name):
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path, buffer_size=CHUNK) as file:
            batches = file.iter_batches(batch_size=256)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} is a Parquet file that is damaged: {error}. Fetch it again.") from error


def arrow_rows(path: Path, streamed: bool) -> Iterator[NumberedRow]:
    """The rows of a file of Arrow's, or of a stream, as `datasets` saves, numbered from 1. Raises DataError where it is
    damaged, or pyarrow missing."""
    with _from_extra(path.name):
        from pyarrow import ipc, memory_map
    try:
        with memory_map(str(path)) as source, (ipc.open_stream if streamed else ipc.open_file)(source) as file:
            batches = file if streamed else (file.get_batch(index) for index in range(file.num_record_batches))
            pieces = (batch.slice(at, 256) for batch in batches for at in range(0, batch.num_rows, 256))
            yield from enumerate((row for piece in pieces for row in piece.to_pylist()), 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} is an Arrow file that is damaged: {error}. Fetch it again.") from error


def _check_twice(name: str, columns: Iterable[object]) -> None:
    """Raise DataError for two columns of one name, of which the last would be read."""
    twice = [column for column, count in Counter(columns).items() if count > 1 and column not in (None, "")]
    if twice:
        raise DataError(f"{name} has more than one column that is called {twice[0]!r}. Rename or remove one.")


@contextmanager
def _from_extra(name: str) -> Iterator[None]:
    """DataError with the way to what reads such a file, where it is not installed."""
    try:
        yield
    except ImportError:
        raise DataError(f"To read {name}: pip install 'chatmagic[data]'.") from None
