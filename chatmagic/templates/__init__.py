"""Chat templates as data: from one row follow the prompt, its ids and the spans that are trained."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from ..errors import ChatmagicError
from ..messages import validate_messages


class TemplateError(ChatmagicError):
    """A template that is unknown, or cannot render or train on this conversation."""


class Piece(NamedTuple):
    """A stretch of a rendered conversation.

    In a `live` piece, written by the template, control tokens are real; in someone's words they are text.
    A `trained` piece is what the model must learn to say: an answer and the token that ends it. A trained
    piece without text stands for an ending token that the format leaves out of the history.
    """

    text: str
    live: bool
    trained: bool


END_OF_TURN = Piece("", live=True, trained=True)


def control_tokens(tokenizer, literals: str) -> dict[str, int]:
    """The added tokens that structure a conversation and that no message may write, with their ids.

    Special ones, those in `tokenizer.chat_control_tokens`, and those in the template's own `literals`.
    """
    named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or token.content in named
        or (token.content in literals and not token.content.isspace())
    }


@dataclass(frozen=True)
class Template:
    """One family's format. Every format string holds one `{}` slot; see `families.toml`."""

    name: str
    user: str
    prompt: str
    answer: str = "{}"
    end: str = ""
    gap: str = ""
    system: str = "{}"
    default_system: str | None = None
    stop_strings: tuple[str, ...] = ()

    def control_tokens(self, tokenizer) -> dict[str, int]:
        return control_tokens(tokenizer, self.system + self.user + self.prompt + self.answer + self.end)

    def stop_token_ids(self, tokenizer) -> list[int]:
        """The ids that end a generation, the one the template trains first."""
        ids = tokenizer.get_vocab()
        stops = [ids[self.end]] if self.end in ids else []
        return list(dict.fromkeys([*stops, tokenizer.eos_token_id]))

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = True, multi_rounds: bool = True
    ) -> list[Piece]:
        """Valid messages as pieces; joined, they are the prompt."""
        pieces = []
        if messages[0]["role"] == "system":
            pieces += self._turn("system", messages[0]["content"])
            messages = messages[1:]
        elif self.default_system is not None:
            pieces += self._turn("system", self.default_system)
        for index, message in enumerate(messages):
            if message["role"] == "user":
                pieces += self._turn("user", message["content"])
                if add_generation_prompt or index + 1 < len(messages):
                    pieces.append(Piece(self.prompt, live=True, trained=False))
            else:
                trained = multi_rounds or index + 1 == len(messages)
                before, after = self.answer.split("{}")
                pieces += [
                    Piece(before + message["content"] + after, live=False, trained=trained),
                    Piece(self.end, live=True, trained=trained),
                    Piece(self.gap, live=True, trained=False),
                ]
        return pieces

    def _turn(self, role: str, content: str) -> list[Piece]:
        before, after = getattr(self, role).split("{}")
        return [Piece(before, True, False), Piece(content, False, False), Piece(after, True, False)]


@cache
def _table() -> dict[str, Template]:
    rows = tomllib.loads((files(__name__) / "families.toml").read_text("utf-8"))
    return {name: Template(name=name, **row) for name, row in rows.items()}


def get_template(model_type: str | None = None, tokenizer=None, model=None) -> Template:
    """The template named `model_type`, or the one that fits a loaded tokenizer and model.

    Raises TemplateError for an unknown name, with the nearest ones, and where nothing fits.
    """
    if model_type is not None:
        if template := _table().get(model_type):
            return template
        near = get_close_matches(model_type, _table(), 3, cutoff=0)
        raise TemplateError(f"No template is called {model_type!r}; the nearest are {', '.join(near)}.")
    if getattr(tokenizer, "chat_template", None):
        from .own import OwnTemplate

        return OwnTemplate(tokenizer)
    raise TemplateError(
        "The tokenizer brings no chat template and none of the known families fits it; pass model_type=."
    )


def build_prompt(messages: Sequence[dict], model_type: str, add_generation_prompt: bool = True) -> str:
    """The prompt as a string. For the ids that a model is sent, use `encode_prompt`: a string cannot tell a
    control token from the same characters typed by a user."""
    validate_messages(messages)
    return "".join(piece.text for piece in get_template(model_type).render(messages, add_generation_prompt))
