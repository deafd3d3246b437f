"""A row, as every reader of a file gives it."""

from ..errors import ChatmagicError

CHUNK = 1 << 20  # bytes read at a time where a row may go over lines
FIRST_BYTES = 1 << 16  # bytes that tell what a file is


class DataError(ChatmagicError):
    """A file or a batch that cannot be trained on."""


# (number of the line or row, what stands there, or why that cannot be read)
NumberedRow = tuple[int, object]
