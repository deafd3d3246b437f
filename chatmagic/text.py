"""Text as people see it: how wide it is, what a terminal would obey, and what somebody may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches
from unicodedata import east_asian_width

CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
CONTROL |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # some terminals obey these as well
CONTROL |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # half a character: no stream can encode it
OBEYED: dict[int, int | str] = {code: f"<U+{code:04X}>" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
SHOWN = OBEYED | CONTROL
"""What is shown in the place of control characters, and of those that turn the direction of what follows them."""


def visible(text: str) -> str:
    """The text, with what a terminal would obey shown: control characters but for newline and tab as ␀ and so on, those
    that turn the direction of writing as <U+202E>, and half a character as U+FFFD."""
    return text.translate(SHOWN)


def mend(text: str) -> str:
    """The text, the two halves of a character (UTF-16's surrogates) joined, and U+FFFD for half a one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def width(text: str) -> int:
    """The columns of a terminal that the text takes: a Chinese character takes two (Unicode's annex 11)."""
    return sum(2 if east_asian_width(char) in "WF" else 1 for char in text)


def fit(text: str, columns: int) -> str:
    """The text in one line of so many columns, cut with "…" or filled with blanks."""
    line = ""
    for char in " ".join(text.split()):
        if width(line + char) > columns:
            line = line[:-1] + "…"
            break
        line += char
    return line + " " * (columns - width(line))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to three of `known` that are spelt like `word`, the likest first, whatever their case. `cutoff` is difflib's:
    0 takes the three nearest however far they are."""
    names = {name.lower(): name for name in known}
    return [names[near] for near in get_close_matches(word.lower(), names, 3, cutoff)]


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'a' or 'b'?`, or "" where nothing known is spelt like `word`."""
    near = nearest(word, known, cutoff)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
