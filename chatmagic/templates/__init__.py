"""Chat templates as data: from one row follow the prompt, its ids and the spans that are trained."""

import re
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from importlib.resources import files
from typing import NamedTuple

from ..errors import ChatmagicError
from ..messages import validate_messages


class TemplateError(ChatmagicError):
    """A template that is unknown, or that cannot render or train a conversation."""


class Piece(NamedTuple):
    """A stretch of a rendered conversation.

    In a `live` piece, written by the template, control tokens are real; in someone's words they are text.
    A `trained` piece is what the model must learn to say: an answer and the token that ends it.
    """

    text: str
    live: bool = True
    trained: bool = False


class EndOfTurn(Piece):
    """An ending token that the model must say here but that the format leaves out of the history."""


@dataclass(frozen=True)
class Template:
    """One format. `families.toml` shows it at work; every turn has one slot, written `{}`.

    name            FastChat's name where it has one
    user            a user turn; `{round}` counts the rounds from `first_round`
    prompt          what leads to an answer
    answer          how an answer's words are joined to the prompt
    end             what the model says last; empty: the tokenizer's eos, which then stays out of the history
    gap             what follows a finished answer
    system          the system text's place; `system_in_user`: it stands inside the first user turn
    default_system  the template's own system text; None: no system text, no system turn
    takes_system    False: the model knows no system text
    bos             tokens before the first turn, which `build_prompt` does not show; None: the tokenizer's own
    reserved        a pattern for tokens that the tokenizer does not mark special and that no message may write
    piecewise       True: every piece is encoded by itself
    strip           True: messages lose the whitespace around them
    joint           what stands between two turns in place of `end` and the like; it forbids training
    starts_ended    True: the first user turn is labelled as if it followed an answer
    stop_strings    texts that stop a generation
    stop_ids        token ids that do, besides `end` and eos
    """

    name: str
    user: str
    prompt: str = ""
    answer: str = "{}"
    end: str = ""
    gap: str = ""
    system: str = "{}"
    default_system: str | None = None
    system_in_user: bool = False
    takes_system: bool = True
    bos: str | None = None
    reserved: str = ""
    first_round: int = 1
    piecewise: bool = False
    strip: bool = False
    joint: str | None = None
    starts_ended: bool = False
    stop_strings: Sequence[str] = ()
    stop_ids: Sequence[int] = ()

    def control_tokens(self, tokenizer) -> dict[str, int]:
        literals = (self.bos or "", self.system, self.default_system or "", self.user, self.prompt, self.end, self.gap)
        return control_tokens(tokenizer, "\0".join(literals), self.reserved)

    def stop_token_ids(self, tokenizer) -> list[int]:
        """The ids that end a generation, first the one that training teaches."""
        end = self.control_tokens(tokenizer).get(self.end.strip())
        ids = dict.fromkeys([end, tokenizer.eos_token_id, *self.stop_ids])
        return [token for token in ids if token is not None and token < len(tokenizer)]

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = True, multi_rounds: bool = True
    ) -> list[Piece]:
        """Valid messages as pieces; their texts, joined, are the prompt."""
        opening, messages = self._opening(messages)
        pieces = [] if self.system_in_user else list(opening)
        if self.starts_ended and not opening:
            pieces.append(EndOfTurn("", trained=multi_rounds or len(messages) == 2))
        for index, message in enumerate(messages):
            words, last = message["content"], index + 1 == len(messages)
            if self.strip:
                words = words.rstrip() if index == 0 and opening else words.strip()
            if message["role"] == "user":
                before, after = self._slots[0]
                pieces.append(Piece(before.replace("{round}", str(self.first_round + index // 2))))
                if index == 0 and self.system_in_user:
                    pieces += opening
                pieces += Piece(words, live=False), Piece(after if last or self.joint is None else self.joint)
                if self.prompt and (add_generation_prompt or not last):
                    pieces.append(Piece(self.prompt))
            else:
                trained = multi_rounds or last
                before, after = self._slots[1]
                pieces.append(Piece(before + words + after, False, trained))
                if self.joint is not None and not last:
                    pieces.append(Piece(self.joint))
                else:
                    pieces.append(Piece(self.end, True, trained) if self.end else EndOfTurn("", True, trained))
                    pieces.append(Piece(self.gap))
        return pieces

    @cached_property
    def _slots(self) -> tuple[list[str], ...]:
        return tuple(text.split("{}") for text in (self.user, self.answer, self.system))

    def _opening(self, messages: Sequence[dict]) -> tuple[list[Piece], Sequence[dict]]:
        """The system text's pieces, and the messages after it."""
        own = messages[0]["role"] != "system"
        words = self.default_system if own else messages[0]["content"]
        rest = messages if own else messages[1:]
        if len(self._slots[2]) == 1:  # a constant: whoever writes a system text is not heard
            return [Piece(self.system)] if self.system else [], rest
        if not words and self.default_system is None:
            return [], rest
        before, after = self._slots[2]
        return [Piece(before), Piece(words, live=own), Piece(after)], rest


def control_tokens(tokenizer, literals: str, reserved: str = "") -> dict[str, int]:
    """The added tokens that no message may write, with their ids.

    They are those marked special, those in `tokenizer.chat_control_tokens`, those in the template's own `literals`
    and those that match `reserved`.
    """
    named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or token.content in named
        or (token.content in literals and not token.content.isspace())
        or (reserved and re.fullmatch(reserved, token.content))
    }


@cache
def _table() -> dict[str, Template]:
    rows = {}
    for file in "families.toml", "fastchat.toml":
        rows |= tomllib.loads((files(__name__) / file).read_text("utf-8"))

    def fields(row: dict) -> dict:
        own = {key: value for key, value in row.items() if key != "like"}
        return fields(rows[row["like"]]) | own if "like" in row else own

    return {name: Template(name=name, **fields(row)) for name, row in rows.items()}


# One token, at the id it has there and nowhere else, tells a family from all others.
_SIGNS = {
    "baichuan2-chat": ("<reserved_106>", 195),
    "baichuan-chat": ("<reserved_102>", 195),
    "qwen-7b-chat": ("<|extra_0|>", 151646),
    "internlm-chat": ("<eoa>", 103028),
    "chatglm3": ("<|user|>", 64795),
    "chatglm2": ("[gMASK]", 64790),
}


def get_template(model_type: str | None = None, tokenizer=None, model=None):
    """The template named `model_type`; without a name, the one that fits a loaded tokenizer and model.

    Most families of the course are found by their vocabulary, SmolLM2 and Llama-2 by what their tokenizer's chat template
    writes (Llama-2 without one by its folder's name), every other model is served by its own chat template. Raises TemplateError for an unknown name, with the three nearest, and where nothing fits.
    """
    if model_type is not None:
        if template := _table().get(model_type):
            return template
        names = {name.lower(): name for name in _table()}
        near = [names[name] for name in get_close_matches(model_type.lower(), names, 3, cutoff=0)]
        raise TemplateError(f"No template is called {model_type!r}; the nearest are {', '.join(near)}.")
    if tokenizer is not None:
        for name, (token, token_id) in _SIGNS.items():
            if tokenizer.convert_tokens_to_ids(token) == token_id:
                return _table()[name]
    where = f"{getattr(tokenizer, 'name_or_path', '')} {getattr(getattr(model, 'config', None), '_name_or_path', '')}"
    if getattr(tokenizer, "chat_template", None):
        from .own import OwnTemplate

        own = OwnTemplate(tokenizer)
        return next((row for row in (_table()["smollm2"], _table()["llama-2"]) if own.writes_like(row)), own)
    if re.search(r"llama-?2.*chat", where, re.IGNORECASE):
        return _table()["llama-2"]
    raise TemplateError(
        "No known family has this tokenizer's vocabulary, and it brings no chat template. "
        'Pass the name of a template, for example model_type="llama-2".'
    )


def build_prompt(messages: Sequence[dict], model_type: str, add_generation_prompt: bool = True) -> str:
    """The conversation as one string, byte for byte FastChat's under its own names (but for "internlm-chat", which
    follows the publisher). After a last user turn comes what leads to an answer, unless `add_generation_prompt=False`.

    For what a model is sent use `encode_prompt`: a string cannot tell a control token from the same characters
    typed by a user. Warns where the model knows no system text and is given one.
    """
    validate_messages(messages)
    template = get_template(model_type)
    if messages[0]["role"] == "system" and not template.takes_system:
        warnings.warn(f"{model_type} knows no system text; encode_prompt refuses it.", stacklevel=2)
    return "".join(piece.text for piece in template.render(messages, add_generation_prompt))
