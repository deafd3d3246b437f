"""Chat templates as data: from one row follow the prompt, its ids and the spans that are trained."""

import re
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..conversation.messages import Message, validate_messages
from ..conversation.pieces import Parting
from ..errors import ChatmagicError
from ..text import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .own import OwnTemplate


class TemplateError(ChatmagicError):
    """A template that is unknown, or that cannot render or train a conversation."""


class NoSystemError(TemplateError):
    """A system text for a model that knows none."""


def no_system(template: str, said: str = "") -> NoSystemError:
    """The error for that template, with what it said itself."""
    said = f" ({said})" if said else ""
    return NoSystemError(
        f"Message 0 has role 'system', and {template} has no place for it{said}; expected user. Put it into the first "
        'question, or pass system="merge", which does.'
    )


def is_greeting(messages: Sequence[Message], index: int) -> bool:
    """Whether the message there is an assistant's that nobody asked for, and that is not trained."""
    greeting = messages[index] if index < len(messages) else {}
    return greeting.get("role") == "assistant" and greeting.get("weight") == 0


def no_greeting(template: str) -> TemplateError:
    """What to say where a greeting has no place."""
    return TemplateError(f"The conversation begins with the assistant, and {template} has no place for that.")


class Span(NamedTuple):
    """A stretch of a rendered conversation.

    In a `live` span, written by the template, control tokens are real; in someone's words they are text.
    An `answer` is what the model says, the token that ends it included; it may be `trained`, and its message may
    say that it is `replayed`: the base model's own words.
    """

    text: str
    live: bool = True
    answer: bool = False
    trained: bool = False
    replayed: bool = False


class EndOfTurn(Span):
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
    system          the system text's place; without a slot, a constant that stands in its stead
    system_in_user  True: that place is inside the first user turn
    default_system  the template's own system text; None: no system text, no system turn
    takes_system    False: the model knows no system text
    bos             tokens before the first turn, not shown by `build_prompt`; None: the tokenizer's own
    reserved        a pattern of tokens, not marked special, that no message may write either
    piecewise       True: every piece is encoded by itself
    strip           True: messages lose the whitespace around them
    joint           what stands between two turns in place of `end` and the like; it forbids training
    starts_ended    True: the first user turn is labelled as if it followed an answer
    stop_strings    texts that stop a generation
    stop_ids        token ids that do, besides `end` and eos
    sign            a token at the id that it has in this family and in none after it
    """

    name: str
    user: str
    prompt: str = ""
    answer: str = "{}"
    end: str = ""
    gap: str = ""
    system: str = "{}"
    system_in_user: bool = False
    default_system: str | None = None
    takes_system: bool = True
    bos: str | None = None
    reserved: str = "(?!)"
    first_round: int = 1
    piecewise: bool = False
    strip: bool = False
    joint: str | None = None
    starts_ended: bool = False
    stop_strings: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    sign: tuple[str, int] | None = None

    def control_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
        """The tokens that no message may write, with their ids."""
        texts = self.bos, self.system, self.default_system, self.user, self.prompt, self.end, self.gap
        return control_tokens(tokenizer, "\0".join(filter(None, texts)), self.reserved)

    def stop_token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """The ids that end a generation, first the one that training teaches."""
        end = self.control_tokens(tokenizer).get(self.end.strip())
        ids = dict.fromkeys([end, tokenizer.eos_token_id, *self.stop_ids])
        return [token for token in ids if token is not None and token < len(tokenizer)]

    @property
    def knows_thoughts(self) -> bool:
        """Whether a model of this format thinks before it answers."""
        return False

    def thinking_for(self, messages: Sequence[Message]) -> bool | None:
        """How a conversation is trained where nobody says."""

    def parting(self, thinking: bool | None) -> Parting | None:
        """What parts a reply to a prompt with that `thinking` as it comes; None where there is nothing to part."""

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, thinking: bool | None = None
    ) -> list[Span]:
        """Valid messages as spans; their texts joined are the prompt. Raises TemplateError for `thinking=True`."""
        if thinking:
            raise TemplateError(f"thinking=True: template {self.name!r} knows no thoughts. Leave thinking out.")
        return self._render(messages, add_generation_prompt, None)

    def render_rows(
        self, messages: Sequence[Message], multi_rounds: bool = True, thinking: bool | None = None
    ) -> list[list[Span]]:
        """The rows that train a conversation, as spans: here one for all answers, or for the last.

        Raises TemplateError for a thought, for a greeting, and where an answered turn is written in another way than
        one that asks.
        """
        if is_greeting(messages, messages[0]["role"] == "system"):
            raise no_greeting(f"template {self.name!r}")
        for index, message in enumerate(messages):
            if thinking or message.get("reasoning_content"):
                raise TemplateError(
                    f"Message {index} ({message['role']}) has a thought, or thinking=True was passed, and template "
                    f"{self.name!r} knows no thoughts. Take it out, or pass another model_type."
                )
        return [self._render(messages, messages[-1]["role"] == "user", multi_rounds)]

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, multi_rounds: bool | None
    ) -> list[Span]:
        """The spans; all answers are trained, with `multi_rounds=False` the last turn, with None nothing."""
        opening, begin = self._opening(messages)
        spans = [] if self.system_in_user else list(opening)
        if self.starts_ended and not opening:
            trained = bool(multi_rounds) or multi_rounds is False and len(messages) == 2
            spans.append(EndOfTurn("", True, True, trained))
        for index in range(begin, len(messages)):
            words, last = messages[index]["content"], index + 1 == len(messages)
            if self.strip:
                words = words.rstrip() if index == begin and opening else words.strip()
            if messages[index]["role"] == "user":
                before, after = self._user
                spans.append(Span(before.replace("{round}", str(self.first_round + (index - begin) // 2))))
                if index == begin and self.system_in_user:
                    spans += opening
                spans += Span(words, live=False), Span(after if last or self.joint is None else self.joint)
                if add_generation_prompt or not last:
                    spans.append(Span(self.prompt))
                continue
            trained = bool(multi_rounds) or multi_rounds is False and last
            trained &= bool(messages[index].get("weight", 1))  # 0 in OpenAI's fine-tuning files: not to be trained
            replayed = messages[index].get("replayed", False)
            if trained and self.joint is not None:
                raise TemplateError(
                    f"Message {index} (assistant) cannot be trained: template {self.name!r} writes a turn "
                    "that was answered in another way than one that asks. Pass another model_type."
                )
            before, after = self._answer
            spans.append(Span(before + words + after, False, True, trained, replayed))
            if self.joint is not None and not last:
                spans.append(Span(self.joint))
            else:
                spans.append((Span if self.end else EndOfTurn)(self.end, True, True, trained, replayed))
                spans.append(Span(self.gap))
        return spans

    @cached_property
    def _user(self) -> list[str]:
        return self.user.split("{}")

    @cached_property
    def _answer(self) -> list[str]:
        return self.answer.split("{}")

    def _opening(self, messages: Sequence[Message]) -> tuple[list[Span], int]:
        """The system text's spans, and the index of the first message after it."""
        given = messages[0]["role"] == "system"
        words: str | None = messages[0]["content"] if given else self.default_system
        before, slot, after = self.system.partition("{}")
        if not slot:
            return [Span(before)] if before else [], given
        if not words and self.default_system is None:
            return [], given
        return [Span(before), Span(words or "", live=not given), Span(after)], given


def control_tokens(tokenizer: "PreTrainedTokenizerBase", literals: str, reserved: str = "(?!)") -> dict[str, int]:
    """The added tokens that are marked special, are named in `tokenizer.chat_control_tokens`, stand in a
    template's own text, `literals`, or match the pattern `reserved`; with their ids."""
    named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or token.content in named
        or (token.content in literals and not token.content.isspace())
        or re.fullmatch(reserved, token.content)
    }


def control_pattern(tokenizer: "PreTrainedTokenizerBase", control: dict[str, int]) -> str:
    """A pattern of these control tokens, longer ones first, with the whitespace that some of them swallow."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.content in control]
    return (
        "|".join(
            r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
            for token in sorted(tokens, key=lambda token: -len(token.content))
        )
        or "(?!)"
    )


@cache
def _table() -> dict[str, Template]:
    rows: dict[str, dict[str, Any]] = {}
    for file in "families.toml", "fastchat.toml":
        rows |= tomllib.loads((files(__package__) / file).read_text("utf-8"))

    def fields(row: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in row.items() if key != "like"}
        return fields(rows[row["like"]]) | {"sign": None} | own if "like" in row else own

    return {name: Template(name=name, **fields(row)) for name, row in rows.items()}


LLAMA_2 = re.compile(r"llama-?2.*chat", re.IGNORECASE)  # nothing in its files but their folder says what they are


def name_family(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """Note with a tokenizer, as its `chat_family`, what only the name of its model's folder tells: Llama-2's brings no
    chat template. Saved with it, and read again.

    So whoever has the tokenizer has the same template from `get_template`, whatever model stands beside it.
    """
    if not tokenizer.chat_template and LLAMA_2.search(str(folder)):
        tokenizer.chat_family = tokenizer.init_kwargs["chat_family"] = "llama-2"


def get_template(
    model_type: str | None = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> "Template | OwnTemplate":
    """The template named `model_type`; without a name, the one that fits a tokenizer.

    Most families of the course are found by their vocabulary, a Llama-2 without a chat template by its folder (see
    `name_family`, which `load_model` calls), SmolLM2 and other Llama-2 by what their chat template writes; every
    other model is served by its own chat template. Raises TemplateError for an unknown name, with the three nearest,
    and where nothing fits.
    """
    if model_type is not None:
        if template := _table().get(model_type):
            return template
        raise TemplateError(f"No template is called {model_type!r}{did_you_mean(model_type, _table(), cutoff=0)}")
    if tokenizer is None:
        raise TemplateError("Pass the name of a template, model_type=..., or a tokenizer to find it by.")
    for template in _table().values():
        if template.sign and tokenizer.convert_tokens_to_ids(template.sign[0]) == template.sign[1]:
            return template
    if tokenizer.chat_template:
        from .own import OwnTemplate

        own = OwnTemplate(tokenizer)
        return next((row for row in (_table()["smollm2"], _table()["llama-2"]) if own.writes_like(row)), own)
    if getattr(tokenizer, "chat_family", None) or LLAMA_2.search(tokenizer.name_or_path):
        return _table()["llama-2"]
    raise TemplateError(
        "No known family has this tokenizer's vocabulary, and it brings no chat template. "
        'Pass the name of a template, for example model_type="llama-2".'
    )


def build_prompt(messages: Sequence[Message], model_type: str, add_generation_prompt: bool = True) -> str:
    """The conversation `messages` as one string by the template `model_type` (see `get_template`), after a last user
    turn with what leads to an answer if `add_generation_prompt`.

    Byte for byte FastChat's under its own names, but for "internlm-chat", which follows the publisher. For
    what a model is sent use `encode_prompt`: a string cannot tell a control token from the same characters
    typed by a user. Warns where the model knows no system text and is given one.
    """
    validate_messages(messages)
    template = get_template(model_type)
    if messages[0]["role"] == "system" and not template.takes_system:
        warnings.warn(f"{model_type} knows no system text; encode_prompt refuses it.", stacklevel=2)
    return "".join(span.text for span in template.render(messages, add_generation_prompt))
