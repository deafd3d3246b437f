"""A file of conversations, whatever it is and whoever wrote it, as messages; and one line of what became of it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .dataset import Conversation, named
from .file_formats import existing, read_rows
from .forms import Forms, LeftOut
from .rows import DataError


class Summary:
    """What was read of a file, and what was not: `str` is one line of it.

    rows, conversations, answers: how many. left_out: {why: the lines}. unused: {key: in how many rows it stood}.
    unfilled: {a place to be filled in that stayed as it was: how often}.
    """

    def __init__(self, name: str) -> None:
        self.name, self.rows, self.conversations, self.answers, self.masked = name, 0, 0, 0, 0
        self.left_out: dict[str, list[int]] = {}
        self.unused: dict[str, int] = {}
        self.unfilled: dict[str, int] = {}
        self.unanswered = 0

    def leave_out(self, reason: str, line: int) -> None:
        """Count a row; reasons that differ by a number are one kind."""
        kinds = (kind for kind in self.left_out if re.sub(r"\d+", "", kind) == re.sub(r"\d+", "", reason))
        self.left_out.setdefault(next(kinds, reason), []).append(line)

    def __str__(self) -> str:
        out = sum(map(len, self.left_out.values()))
        parts = [f"{_count(self.rows, 'row')} read", f"{_count(self.conversations, 'conversation')}"]
        parts.append(
            _count(self.answers, "answer") + (f" and {self.masked:,} not to be trained" if self.masked else "")
        )
        if out:
            kinds = (f"{len(lines):,} {why.rstrip('.')} ({_lines(lines)})" for why, lines in self.left_out.items())
            parts.append(f"{out:,} left out: {'; '.join(kinds)}")
        if self.unanswered:
            parts.append(f"{_count(self.unanswered, 'last question')} without an answer not used")
        if self.unfilled:
            shown = ", ".join(list(self.unfilled)[:3]) + (", ..." if len(self.unfilled) > 3 else "")
            parts.append(f"{_count(sum(self.unfilled.values()), 'place')} to be filled in left as they are: {shown}")
        if self.unused:
            parts.append(f"keys not used: {', '.join(self.unused)}")
        return f"{self.name}: {', '.join(parts)}."


class Conversations(Iterator[Conversation]):
    """The conversations of a file, each once; `summary` counts them, and is printed after the last."""

    def __init__(self, path: Path, encoding: str | None, on_error: str, forms: Forms) -> None:
        self.summary = Summary(path.name)
        self._rows = self._read(path, encoding, on_error, forms)

    def __next__(self) -> Conversation:
        return next(self._rows)

    def _read(self, path: Path, encoding: str | None, on_error: str, forms: Forms) -> Iterator[Conversation]:
        summary, first = self.summary, None
        summary.unused, summary.unfilled = forms.unused, forms.filling.unfilled
        for line, row in read_rows(path, encoding):
            summary.rows += 1
            place = path.name, line, summary.rows
            try:
                if isinstance(row, DataError):
                    raise row
                conversation = Conversation(forms.messages(row))
            except (DataError, LeftOut) as error:
                if on_error == "stop" and isinstance(error, DataError):
                    raise DataError(f'{named(*place)}: {error} (on_error="skip" goes on without such rows.)') from None
                summary.leave_out(str(error), line)
                first = first or f"{named(*place)}: {error}"
                continue
            conversation.place = place
            for message in conversation:
                if message["role"] == "assistant":
                    if message.get("weight", 1):
                        summary.answers += 1
                    else:
                        summary.masked += 1
            summary.conversations += 1
            yield conversation
        summary.unanswered = forms.unanswered
        if not summary.conversations:
            raise DataError(
                f"{path.name}: nothing to train in {_count(summary.rows, 'row')}. {first or 'It is empty'}."
            )
        if missing := forms.keys.unseen():
            raise DataError(f"{path.name}: {missing}")
        print(summary, flush=True)


def read_conversations(
    path: str | Path,
    columns: Mapping[str, str] | Iterable[str] | None = None,
    encoding: str | None = None,
    on_error: str = "stop",
    persona: object = None,
) -> Conversations:
    """The conversations of a file as valid lists of messages, read as they are consumed; a summary is printed last.

    path: JSON lines, a JSON array, objects one after another, CSV; Parquet, Arrow and Excel with the extra `data`;
        each also packed by gzip, bz2 or xz. docs/data.md lists the forms of rows, which are found by their keys.
    columns: what the columns are, where their names do not say it: {"content": "query", "summary": "response"}, or the
        two names alone. With preference data, {"chosen": "response"} takes the answers that were chosen.
    encoding: of a text that is not UTF-8: "gbk", "utf-16".
    on_error: "stop" raises DataError, with file and line, at the first row that cannot be read, or would be trained
        otherwise than it is meant; "skip" leaves such rows out and counts them.
    persona: a Persona or a dict, whose fields stand in the place of {{name}}, {{author}} and the like.

    What is empty or labelled bad is left out and counted either way. An answer that is not to be trained has
    `"weight": 0`. `.summary` of what is returned has the counts. Raises DataError also for a file that is not there, is
    none of these, or holds nothing to train.
    """
    if on_error not in ("stop", "skip"):
        raise DataError(f'on_error={on_error!r} is not known; give "stop" or "skip".')
    return Conversations(existing(path), encoding, on_error, Forms(columns, persona))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _lines(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:3]))
    return f"line {shown}" if len(lines) == 1 else f"lines {shown}" + (", ..." if len(lines) > 3 else "")
