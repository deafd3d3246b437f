"""What a model sends, piece by piece: words, which are plain strings, and beside them its thoughts, and notices."""

from collections.abc import Callable, Iterable, Iterator

from ..text import mend


class Thought(str):
    """A piece of what a model thinks before it speaks."""


class AllThought(Thought):
    """Tells that what was said so far was a thought, which nothing had opened: R1 and QwQ behind a server that does not
    part them. Itself empty."""


class Notice(str):
    """What befell a reply, in words to its reader; no part of it."""


def mended(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces, each of its kind; a character that came in halves is whole, and half a one is U+FFFD."""
    held = ""
    for piece in pieces:
        text = held + piece
        held = text[-1] if "\ud800" <= text[-1:] <= "\udbff" else ""
        yield type(piece)(mend(text[: len(text) - len(held)]))
    if held:
        yield mend(held)


class Heard:
    """What was heard of a reply, sorted, each piece passed on to whoever shows it; a notice as a line of its own."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.said: list[str] = []
        self.thought: list[str] = []
        self.notices: list[str] = []
        self._write, self._line_ended = write, True

    def __call__(self, piece: str) -> None:
        if isinstance(piece, Notice):
            self.notices.append(str(piece))
            piece = Notice(("" if self._line_ended else "\n") + f"[{piece}]\n")
        elif isinstance(piece, AllThought):
            self.thought, self.said = self.said, []
        elif piece:
            (self.thought if isinstance(piece, Thought) else self.said).append(piece)
        if piece or isinstance(piece, AllThought):
            self._line_ended = piece.endswith("\n")
            self._write(piece)


class Parting:
    """Parts a text that comes in pieces into a thought, which may stand first, and words.

    openings  texts of which one begins a thought
    closing   the text that ends it
    lead      what may stand between it and the words, and is no part of either
    opened    whether the prompt has opened the thought
    ending    all that is written between a thought and words, whitespace too
    """

    def __init__(
        self,
        openings: tuple[str, ...] = ("<think>", "<thinking>"),
        closing: str = "</think>",
        lead: str = "",
        opened: bool = False,
        ending: str = "",
    ) -> None:
        self.openings, self.closing, self.lead, self.ending = openings, closing, lead, ending
        self._bare = f"\n{closing}\n\n"  # as models close what the prompt opened; words that mention it do otherwise
        self._held = ""  # what may be part of a mark
        self._seen = ""  # the end of what was shown, as long as a mark
        self._read = self._thought if opened else self._beginning

    @property
    def thinking(self) -> bool:
        """Whether what comes next belongs to a thought, as far as can be told."""
        return self._read == self._thought

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that part."""
        return *self.openings, self.ending or self.closing

    def part(self, text: str) -> tuple[str, str]:
        """(thought, words) of a text that is whole, without the whitespace around them."""
        heard = Heard(lambda piece: None)
        for piece in [*self.push(text), *self.flush()]:
            heard(piece)
        return "".join(heard.thought).strip(), "".join(heard.said).strip()

    def apart(self) -> None:
        """Know that the thought comes by another way, and the text is words."""
        if self._read == self._beginning:
            self._read = self._between

    def push(self, text: str) -> list[str]:
        """The pieces that this text decides."""
        self._held += text
        return self._go_on(last=False)

    def flush(self) -> list[str]:
        """The pieces that are left at the end."""
        return self._go_on(last=True)

    def _go_on(self, last: bool) -> list[str]:
        found, read = [], None
        while read != self._read:
            read = self._read
            found += read(last)
        return [piece for piece in found if piece or isinstance(piece, AllThought)]

    def _beginning(self, last: bool) -> list[str]:
        text = self._held.lstrip()
        if opening := next(filter(text.startswith, self.openings), None):
            self._held, self._read = text[len(opening) :], self._thought
            if opening != self.openings[0]:  # a model that thinks in other tags than those `closing` belongs to
                self.closing = opening.replace("<", "</")
        elif last or not any(opening.startswith(text) for opening in self.openings):
            self._read = self._words
        return []

    def _thought(self, last: bool) -> list[str]:
        thought, closed, rest = self._held.partition(self.closing)
        if not self._seen:
            thought = thought.lstrip()
        if closed or last:
            self._held, self._read = rest, self._between
            return [Thought(thought.rstrip())]
        shown = thought[: len(thought) - _overlap(thought, self.closing)].rstrip()
        self._held, self._seen = thought[len(shown) :], self._seen or shown
        return [Thought(shown)]

    def _between(self, last: bool) -> list[str]:
        text = self._held.lstrip()
        if text.startswith(self.lead):
            self._held = text = text[len(self.lead) :].lstrip()
            self.lead = ""
        if text and not self.lead.startswith(text) or last:
            self._held, self._bare, self._read = text, "", self._words
        return []

    def _words(self, last: bool) -> list[str]:
        if not self._bare:
            said, self._held = self._held, ""
            return [said]
        said, closed, rest = self._held.partition(self._bare)
        if any(opening in self._seen + said for opening in self.openings):
            self._bare = ""
            return self._words(last)
        if closed:
            self._held, self._read = rest, self._between
            return [said, AllThought()]
        shown = said if last else said[: len(said) - _overlap(said, self._bare)]
        self._held = said[len(shown) :]
        self._seen = (self._seen + shown)[-40:]
        return [shown]


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
