"""A bound to how long a local model may think."""

import torch
from transformers import LogitsProcessor


class ThinkingBudget(LogitsProcessor):
    """Leaves a thought `tokens` tokens, then writes what ends it, a token a call. For one reply, at batch 1.

    opening  the ids that begin a thought; empty where the prompt has begun it
    closing  the ids by which it is known that the model has ended it
    ending   the ids written to end it: the closing, with what the template writes around it
    """

    def __init__(self, tokens: int, opening: list[int], closing: list[int], ending: list[int]) -> None:
        self.tokens, self.opening, self.closing, self.ending = tokens, opening, closing, ending
        self._new: list[int] | None = None  # what was generated so far
        self._thought: int | None = None if opening else 0  # tokens of the thought so far; None: not begun
        self._rest: list[int] | None = None  # what is still to be written; None: the thought may go on

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores`, float (1, vocabulary), of the token after `input_ids`, int64 (1, length)."""
        if self._new is None:
            self._new = []
        elif self._rest is None:
            self._new.append(input_ids[0, -1].item())
            self._follow()
        if self._rest is None and self._thought is not None and self._thought >= self.tokens:
            self._rest = list(self.ending)
        if not self._rest:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._rest.pop(0)] = 0
        return forced

    def _follow(self) -> None:
        """Take note of the newest token."""
        if self._thought is not None:
            self._thought += 1
            if self._new[-len(self.closing) :] == self.closing:
                self._rest = []
        elif self._new[-len(self.opening) :] == self.opening:
            self._thought = 0
