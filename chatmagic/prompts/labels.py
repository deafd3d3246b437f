"""A conversation to the ids that inference sends, and to the rows that train it."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..conversation.messages import Message, MessagesError, merge_system, validate_messages
from ..errors import ChatmagicError
from .encoder import IGNORE, Encoder, Row, get_encoder
from .templates import TemplateError, is_greeting, no_system

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Encoded = TypeVar("Encoded")


class LabelsError(ChatmagicError):
    """A conversation that teaches nothing, or that is longer than the model's context."""


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    model_type: str | None = None,
    max_length: int | None = None,
    drop_oldest: bool = False,
    thinking: bool | None = None,
    system: str | None = None,
) -> list[int]:
    """The ids that inference sends for `messages`, which end with a user turn.

    model_type: the name of a template, by default the one that fits the tokenizer, see `get_template`.
    thinking: whether the model is to think, for templates that can be told so; None: what was noted with the tokenizer
        (see `note_thinking`), else the template's default.
    system: "merge" puts a system text into the first question, for a family that knows none.

    A template may write the date: then so do the ids, of the day on which they are made. Raises MessagesError,
    TemplateError, and LabelsError beyond `max_length` tokens (default: the tokenizer's `model_max_length`) unless
    `drop_oldest`, which leaves out whole rounds.
    """
    validate_messages(messages)
    if (role := messages[-1]["role"]) != "user":
        raise MessagesError(f"Message {len(messages) - 1} has role {role!r}; expected user, who asks for the answer.")
    encoder, limit = get_encoder(tokenizer, model_type), max_length or tokenizer.model_max_length
    thinking = vars(tokenizer).get("chat_thinking") if thinking is None else thinking
    messages = _with_system(messages, encoder, system)

    def encode(part: Sequence[Message]) -> list[int]:
        return encoder.encode(encoder.template.render(part, True, thinking)).input_ids

    ids = encode(messages)
    return ids if len(ids) <= limit else _encode_shorter(messages, encode, len, limit, drop_oldest, shortest=1)


def build_inputs_labels(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    model_type: str | None = None,
    multi_rounds: bool = True,
    max_length: int | None = None,
    drop_oldest: bool = False,
    thinking: bool | None = None,
    system: str | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, two lists of the same length.

    Every assistant turn and the token that ends it is trained (`multi_rounds=False`: the last turn only); labels are
    -100 elsewhere. Where a family keeps the ending token out of the history, it is the label of the token that follows
    the answer, as in Baichuan2's fine-tune.py. Arguments and errors as for `encode_rows`; LabelsError also for a
    conversation that needs several rows.
    """
    rows = encode_rows(messages, tokenizer, model_type, multi_rounds, max_length, drop_oldest, thinking, system)
    if len(rows) > 1:
        raise LabelsError(
            f"The conversation needs {len(rows)} rows: its chat template writes a last answer otherwise than earlier "
            "ones. encode_example gives them all, multi_rounds=False the last."
        )
    return rows[0].input_ids, rows[0].labels


def encode_rows(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    model_type: str | None = None,
    multi_rounds: bool = True,
    max_length: int | None = None,
    drop_oldest: bool = False,
    thinking: bool | None = None,
    system: str | None = None,
) -> list[Row]:
    """The rows that train a conversation: one, or where its chat template writes a last answer otherwise than earlier
    ones, one for each answer.

    The ids before an answer are `encode_prompt` of the messages before it, with the same `thinking`; None is what was
    noted with the tokenizer, else off where no answer holds a thought, in `reasoning_content` or before its words in
    `<think>...</think>`. A greeting, an assistant's message of weight 0 before the first question, stays where the
    template writes one. Other arguments and errors as for `encode_prompt`; LabelsError also where nothing is trained.
    """
    greeted = is_greeting(messages, start := bool(messages) and messages[0]["role"] == "system")
    validate_messages([*messages[:start], *messages[start + 1 :]] if greeted else messages)
    last = messages[-1]["role"]
    if last != "assistant" and not (multi_rounds and len(messages) > 2):
        raise LabelsError(f"Nothing is trained: message {len(messages) - 1} has role {last!r}; expected assistant.")
    encoder, limit = get_encoder(tokenizer, model_type), max_length or tokenizer.model_max_length
    thinking = vars(tokenizer).get("chat_thinking") if thinking is None else thinking
    thinking = encoder.template.thinking_for(messages) if thinking is None else thinking
    messages = _with_system(messages, encoder, system)

    def encode(part: Sequence[Message]) -> list[Row]:
        if all(message["role"] != "assistant" for message in part):  # to tell whether the first question is too long
            return [encoder.encode(encoder.template.render(part, True, thinking))]
        finished = part[-1]["role"] == "assistant"
        rows = encoder.template.render_rows(part, multi_rounds, thinking)
        return _joined([encoder.encode_row(spans, finished) for spans in rows])

    def length(rows: list[Row]) -> int:
        return max((len(row.input_ids) for row in rows), default=0)

    rows = encode(messages)
    if length(rows) > limit:
        rows = _encode_shorter(messages, encode, length, limit, drop_oldest, shortest=2)
    if all(label == IGNORE for row in rows for label in row.labels):
        raise LabelsError("Nothing is trained: each answer has weight 0.")
    return rows


def note_thinking(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", thinking: bool | None) -> None:
    """Note with model and tokenizer, as their `chat_thinking`, how the model is trained (`thinking`: to think, not
    to, or None for what its template does by itself): whoever encodes does the same then, an adapter is saved with
    it, and so is a tokenizer."""
    model.chat_thinking = tokenizer.chat_thinking = thinking
    if thinking is not None:
        tokenizer.init_kwargs["chat_thinking"] = thinking


def _with_system(messages: Sequence[Message], encoder: Encoder, system: str | None) -> Sequence[Message]:
    """The messages, the system text in the first question if `system` is "merge". Raises NoSystemError."""
    if system not in (None, "merge"):
        raise TemplateError(f'system={system!r} is not known: give "merge", or leave it out.')
    if messages[0]["role"] != "system":
        return messages
    if system == "merge":
        return merge_system(messages)
    if not encoder.template.takes_system:
        raise no_system(f"template {encoder.template.name!r}")
    return messages


def _encode_shorter(
    messages: Sequence[Message],
    encode: Callable[[Sequence[Message]], Encoded],
    length: Callable[[Encoded], int],
    limit: int,
    drop_oldest: bool,
    shortest: int,
) -> Encoded:
    """What `encode` makes of a conversation that is longer than `limit`, without the oldest rounds if that is allowed,
    but with the last `shortest` messages. Raises LabelsError, naming the message that goes beyond, if none fits."""

    def fits(part: Sequence[Message]) -> bool:
        return length(encode(part)) <= limit

    system = messages[0]["role"] == "system"
    hint = "Pass drop_oldest=True to leave out its oldest rounds."
    if drop_oldest:
        starts = range(system + is_greeting(messages, system), len(messages) - shortest + 1, 2)
        shorter = [[*messages[:system], *messages[start:]] for start in starts]
        if (first := bisect_left(shorter, True, key=fits)) < len(shorter):
            return encode(shorter[first])
        hint = "Not even its last round fits."
    turns = range(system, len(messages))
    over = turns[bisect_left(turns[:-1], True, key=lambda turn: not fits(messages[: turn + 1]))]
    raise LabelsError(
        f"The conversation is {length(encode(messages))} tokens long: message {over} "
        f"({messages[over]['role']}) goes beyond the expected {limit}. {hint}"
    )


def _joined(rows: list[Row]) -> list[Row]:
    """The rows, each that is how a later one begins joined to that one; what follows its last label does not count."""
    kept: list[Row] = []
    for row in rows:
        if kept and kept[-1].begins(row):
            before = kept.pop()
            end = before.end()
            row.labels[:end], row.replayed[:end] = before.labels[:end], before.replayed[:end]
        kept.append(row)
    return kept
