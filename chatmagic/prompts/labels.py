"""Messages to the ids a model is sent, and to the labels it is trained on: one encoder for both."""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from ..conversation.messages import Message, MessagesError, merge_system, validate_messages
from ..errors import ChatmagicError
from .templates import EndOfTurn, Span, TemplateError, control_pattern, get_template, is_greeting, no_system

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .own import OwnTemplate
    from .templates import Template

Encoded = TypeVar("Encoded")
IGNORE = -100  # torch.nn.functional.cross_entropy's ignore_index


class LabelsError(ChatmagicError):
    """A conversation that teaches nothing, or that is longer than the model's context."""


@dataclass
class Row:
    """What is trained on, three lists of the same length: token ids, labels (-100 where nothing is trained), and which
    labels are `replayed`, of an answer whose message says that it is the base model's own."""

    input_ids: list[int]
    labels: list[int]
    replayed: list[bool]

    def teach(self, start: int, ids: list[int], span: Span) -> None:
        """Train `ids` from a position on, whatever stands there; if nothing does, they will."""
        self.labels[start : start + len(ids)] = ids
        self.replayed[start : start + len(ids)] = [span.replayed] * len(ids)
        self.input_ids += ids[len(self.input_ids) - start :]

    def end(self) -> int:
        """The position behind the last that is trained."""
        return next(index for index in range(len(self.labels), 0, -1) if self.labels[index - 1] != IGNORE)

    def begins(self, other: "Row") -> bool:
        """Whether all that this row trains is how the other begins."""
        end = self.end()
        return self.input_ids[:end] == other.input_ids[:end]

    def cut(self) -> None:
        """Take the last token away."""
        del self.input_ids[-1], self.labels[-1], self.replayed[-1]


class Encoder:
    """Spans of a template to token ids and labels.

    Words go through a copy of the tokenizer's backend that takes control tokens for ordinary characters;
    control tokens that the template writes are looked up. What touches is encoded as one string, as the
    publishers do, and offsets say which tokens are an answer's. But an answer always starts a new string, so
    that the ids before it, which inference sends, never depend on it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: "Template | OwnTemplate") -> None:
        self.template = template
        control = self._control = template.control_tokens(tokenizer)
        stops, end = template.stop_token_ids(tokenizer), template.end.strip()
        if not stops or end and end not in self._control and not any(stop in end for stop in template.stop_strings):
            raise TemplateError(
                f"Template {template.name!r} ends a turn with {end!r}, which is no token of this tokenizer: "
                "the model would never stop. Pass the model_type of its own family, or none to have it found."
            )
        self._ending = stops[0]
        split = re.compile(f"({control_pattern(tokenizer, control)})").split
        # Of `self` they know nothing: in a cycle a tokenizer would stay for long, and it is large.
        self._parts = _remember(
            lambda text: [control[part.strip()] if at % 2 else part for at, part in enumerate(split(text)) if part]
        )
        self._fresh, self._joined, always = _text_backends(tokenizer, self._control)
        self._ids = _remember(lambda text, backend: backend.encode(text, add_special_tokens=False).ids)
        if template.bos is None:
            with_bos, without = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
            self._bos = with_bos[: with_bos.index(without[0])]
        else:
            self._bos = [*self._parts(template.bos)]
        self._restart = set(self._control.values() if always else self._bos)

    def encode(self, spans: list[Span]) -> Row:
        """The row of a conversation that goes on after these spans."""
        ids: list[int] = []
        taught, endings, backend = [], [], self._fresh
        for run, token in self._runs(spans):
            start, first = len(ids), run[0]
            if token is None:
                new, count = self._encode_text(run, backend)
                ids += new
                endings += [(start + count, span) for span in run if span.trained and isinstance(span, EndOfTurn)]
                backend = self._joined
            else:
                ids.append(token)
                count = 1
                backend = self._fresh if token in self._restart else self._joined
            if first.trained:
                taught.append((start, ids[start : start + count], first))
        row = Row(ids, [IGNORE] * len(ids), [False] * len(ids))
        for start, new, span in taught:
            row.teach(start, new, span)
        for start, span in endings:
            row.teach(start, [self._ending], span)
        bos = self._bos
        if row.input_ids[: len(bos)] != bos:
            row = Row(bos + row.input_ids, [IGNORE] * len(bos) + row.labels, [False] * len(bos) + row.replayed)
        return row

    def encode_row(self, spans: list[Span], finished: bool) -> Row:
        """The row that trains. `finished`: an answer is the last that is said, so that its ending token stands there
        even where the history leaves it out, and no next turn is opened."""
        if not finished:
            return self.encode(spans)
        last = max(index for index, span in enumerate(spans) if span.answer)
        row = self.encode(spans[: last + 1] if isinstance(spans[last], EndOfTurn) else spans)
        if self._bos and row.input_ids[-1] == self._bos[-1]:
            row.cut()
        return row

    def _runs(self, spans: list[Span]) -> Iterator[tuple[list[Span], int | None]]:
        """The spans in runs, each encoded as one string: (spans, None), or (the span it stands in, a control token)."""
        run: list[Span] = []
        in_answer = False
        for span in spans:
            starts = self.template.piecewise or span.answer and not in_answer
            in_answer = span.answer
            if starts and run:
                yield run, None
                run = []
            if not span.live or isinstance(span, EndOfTurn):
                run.append(span)
                continue
            for part in self._parts(span.text):
                if isinstance(part, str):
                    run.append(Span(part, *span[1:]))
                    continue
                if run:
                    yield run, None
                    run = []
                yield [span], part
        if run:
            yield run, None

    def _encode_text(self, run: list[Span], backend: "Tokenizer") -> tuple[list[int], int]:
        """The ids of a run, encoded as one string, and how many of them are trained: its trained spans come first."""
        if len(run) == 1:
            text = run[0].text
            trained = len(text) if run[0].trained else 0
        else:
            text = "".join([span.text for span in run])
            trained = sum([len(span.text) for span in run if span.trained])
        if trained in (0, len(text)):
            ids = self._ids(text, backend)
            return ids, len(ids) if trained else 0
        encoding = backend.encode(text, add_special_tokens=False)  # offsets take time
        return encoding.ids, bisect_left(encoding.offsets, trained, key=lambda offset: offset[0])


def _remember(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The function, which knows what it made of the last short texts: templates repeat themselves, and so do the rows
    of one conversation. Long ones, which are messages, must not pile up."""
    known = lru_cache(maxsize=256)(function)
    return lambda text, *rest: (known if len(text) < 1000 else function)(text, *rest)


def _text_backends(
    tokenizer: "PreTrainedTokenizerBase", control: dict[str, int]
) -> "tuple[Tokenizer, Tokenizer, bool]":
    """Two copies of a tokenizer's backend that take control tokens for ordinary characters: for a text that
    starts afresh, and for one that continues another, to which SentencePiece adds no space. And whether the
    tokenizer itself starts afresh after every added token.

    The copies share the vocabulary, which is large. Control tokens stay in it, so that the ids of other added
    tokens do not move, but all marked special, for `encode_special_tokens` skips special tokens only.
    """
    from tokenizers import AddedToken, Tokenizer

    backend = tokenizer.backend_tokenizer
    steps = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    fresh, joined = (
        {key: json.loads(step.__getstate__()) if step else None for key, step in steps.items()} for _ in range(2)
    )
    always = False
    for step in [*_steps(joined["normalizer"]), *_steps(joined["pre_tokenizer"])]:
        if step["type"] == "Metaspace":
            always |= step["prepend_scheme"] == "always"
            step["prepend_scheme"] = "never"
        elif step["type"] == "Prepend":
            always, step["prepend"] = True, ""

    def copy(steps: dict[str, Any]) -> Tokenizer:
        made = Tokenizer.from_str(json.dumps(steps | {"model": {"type": "BPE", "vocab": {}, "merges": []}}))
        made.model = backend.model
        for _, token in sorted(tokenizer.added_tokens_decoder.items()):
            special = token.content in control
            flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
            made.add_tokens([AddedToken(token.content, special=special, **flags)])
        made.encode_special_tokens = True
        return made

    first = copy(fresh)
    return first, first if joined == fresh else copy(joined), always


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer, or the members of a Sequence of them."""
    if step is None:
        return []
    members = step.get("normalizers") or step.get("pretokenizers")
    return [each for member in members for each in _steps(member)] if members else [step]


def get_encoder(tokenizer: "PreTrainedTokenizerBase", model_type: str | None = None) -> Encoder:
    """The encoder of a tokenizer, kept as long as nothing that it was made from changes: neither the chat template
    nor what is a special token, and which of them is eos."""
    special = *tokenizer.special_tokens_map.items(), *tokenizer.all_special_tokens, len(tokenizer)
    own = vars(tokenizer)  # which its own __getattr__ would search for long where there is no such attribute
    named = own.get("chat_family"), own.get("add_bos_token"), tuple(own.get("chat_control_tokens") or ())
    return _make_encoder(tokenizer, model_type, (str(tokenizer.chat_template), special, named))


@lru_cache(maxsize=8)
def _make_encoder(tokenizer: "PreTrainedTokenizerBase", model_type: str | None, state: tuple[object, ...]) -> Encoder:
    return Encoder(tokenizer, get_template(model_type, tokenizer))


def _prepare(messages: Sequence[Message], encoder: Encoder, system: str | None) -> Sequence[Message]:
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
    messages = _prepare(messages, encoder, system)

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
    messages = _prepare(messages, encoder, system)

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


def note_thinking(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", thinking: bool | None) -> None:
    """Note with model and tokenizer, as their `chat_thinking`, how the model is trained: whoever encodes does the same
    then, an adapter is saved with it, and so is a tokenizer."""
    model.chat_thinking = tokenizer.chat_thinking = thinking
    if thinking is not None:
        tokenizer.init_kwargs["chat_thinking"] = thinking
