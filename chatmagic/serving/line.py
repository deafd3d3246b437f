"""The line before one device: who asks waits for those before, who finds it too long is sent away."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from threading import Event

from ..conversation.reply import Reply
from ..errors import ChatmagicError

Ask = Callable[[Callable[[str], None]], Reply]
"""Asks a model; calls what it is given with each piece of the reply."""


class Full(ChatmagicError):
    """The line is too long; `seconds` until there may be room."""

    def __init__(self, longest: int, seconds: int) -> None:
        super().__init__(f"{longest} questions wait here already: ask again in {seconds} s")
        self.seconds = seconds


class Left(Exception):
    """The asker is gone; ends the generation."""


class Line:
    """One worker thread, and those who wait for it, in the order they came; `longest` of them, the one who is being
    answered included."""

    def __init__(self, longest: int) -> None:
        self.longest, self.length = longest, 0
        self._seconds = 1.0  # that the last reply took
        self._worker = ThreadPoolExecutor(1, "chatmagic-model")

    async def answer(self, ask: Ask) -> AsyncGenerator[str, None]:
        """The pieces of the reply, and lastly the `Reply`. Closing this, or cancelling who waits for it, takes the
        question out of the line, or ends the generation at its next piece. Raises Full, and what `ask` raises."""
        if self.length >= self.longest:
            raise Full(self.longest, max(1, ceil(self._seconds)))
        loop, pieces, left = asyncio.get_running_loop(), asyncio.Queue[str | None](), Event()

        def write(piece: str) -> None:
            if left.is_set():
                raise Left
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self.length += 1
        coming = loop.run_in_executor(self._worker, ask, write)
        coming.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            reply = await coming
            self._seconds = reply.stats.seconds
            yield reply
        finally:
            self.length -= 1
            left.set()
            coming.cancel()
