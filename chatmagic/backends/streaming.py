"""Tokens as the pieces of text that they are shown as: whole characters, and nothing from a stop string on."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from ..conversation.pieces import Thought


class TextStream:
    """Text of token ids that arrive one by one: whole characters only, and nothing from a stop string on.

    A token may hold part of a character, and some tokenizers decode a token differently after another; so the
    text of a token is what decoding it together with the tokens shown just before adds to theirs. Special tokens have
    none, but for those in `marks`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], marks: Collection[str] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, StopStrings(stop_strings)
        special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.skipped = {id for text, id in special.items() if not any(text in mark for mark in marks)}
        self.shown: list[int] = []  # the tokens of the last piece
        self.pending: list[int] = []  # tokens after those, up to the end of a character

    def push(self, token: int) -> str:
        """The text that a token adds; "" while a character or a stop string is incomplete."""
        self.pending.append(token)
        before, after = self._decode(self.shown), self._decode(self.shown + self.pending)
        if after == before or after.endswith("\ufffd"):
            return ""
        self.shown, self.pending = self.pending, []
        return self.stop.push(after[len(before) :])

    def flush(self) -> str:
        """What is left at the end: half a character as U+FFFD, text that was no stop string after all."""
        rest = self._decode(self.shown + self.pending)[len(self._decode(self.shown)) :]
        self.pending = []
        return self.stop.push(rest) + self.stop.flush()

    def _decode(self, ids: list[int]) -> str:
        ids = [token for token in ids if token not in self.skipped]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class StopStrings:
    """Lets a text through that comes in pieces, up to the first of `strings`; a thought is no part of it."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._held, self.found = strings, "", False  # held: what may be the beginning of one

    def push(self, piece: str) -> str:
        """What of it, and of what was held, is let through; "" once one was found."""
        if self.found or isinstance(piece, Thought):
            return "" if self.found else piece
        text, self._held = self._held + piece, ""
        if ends := [at for stop in self._strings if (at := text.find(stop)) >= 0]:
            self.found = True
            return text[: min(ends)]
        longest = max(
            (n for stop in self._strings for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        if longest:
            text, self._held = text[:-longest], text[-longest:]
        return text

    def flush(self) -> str:
        """What was held and is none after all."""
        return self._held
