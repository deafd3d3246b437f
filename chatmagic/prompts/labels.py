"""Messages to the ids a model is sent, and to the labels it is trained on: one encoder for both."""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ..conversation.messages import MessagesError, validate_messages
from ..errors import ChatmagicError
from .templates import EndOfTurn, Span, TemplateError, control_pattern, get_template

IGNORE = -100  # torch.nn.functional.cross_entropy's ignore_index


class LabelsError(ChatmagicError):
    """A conversation that teaches nothing, or that is longer than the model's context."""


@dataclass
class Row:
    """What is trained on, three lists of the same length: token ids, labels (-100 where nothing is trained), and which
    labels are `replayed`, of an answer whose message says that it is the base model's own."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    replayed: list[bool] = field(default_factory=list)

    def add(self, ids: list[int], span: Span) -> None:
        """Tokens of one span, trained if it is."""
        self.input_ids += ids
        self.labels += ids if span.trained else [IGNORE] * len(ids)
        self.replayed += [span.trained and span.replayed] * len(ids)

    def teach(self, position: int, token: int, span: Span) -> None:
        """Train `token` as what follows the ids before `position`, whatever stands there; if nothing does, it will."""
        if position == len(self.input_ids):
            self.add([token], span)
        self.labels[position], self.replayed[position] = token, span.replayed

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

    def __init__(self, tokenizer, template):
        self.template = template
        self._control = template.control_tokens(tokenizer)
        stops, end = template.stop_token_ids(tokenizer), template.end.strip()
        if not stops or end and end not in self._control and not any(stop in end for stop in template.stop_strings):
            raise TemplateError(
                f"Template {template.name!r} ends a turn with {end!r}, which is no token of this tokenizer: "
                "the model would never stop. Pass the model_type of its own family, or none to have it found."
            )
        self._ending = stops[0]
        remember = lru_cache(maxsize=256)  # a template repeats itself; messages, which do not, must not pile up
        self._parts = remember(re.compile(f"({control_pattern(tokenizer, self._control)})").split)
        self._fresh, self._joined, always = _text_backends(tokenizer, self._control)
        self._literal = remember(lambda text, backend: backend.encode(text, add_special_tokens=False).ids)
        if template.bos is None:
            with_bos, without = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
            self._bos = with_bos[: with_bos.index(without[0])]
        else:
            self._bos = [self._control[token] for token in self._parts(template.bos) if token]
        self._restart = set(self._control.values() if always else self._bos)

    def encode(self, spans: list[Span]) -> Row:
        """The row of a conversation that goes on after these spans."""
        row, backend, endings = Row(), self._fresh, []
        for run in self._runs(spans):
            if isinstance(run, list):
                count = self._add_text(row, run, backend)
                endings += [(count, span) for span in run if span.trained and isinstance(span, EndOfTurn)]
                backend = self._joined
            else:
                token = self._control[run.text.strip()]
                row.add([token], run)
                backend = self._fresh if token in self._restart else self._joined
        for position, span in endings:
            row.teach(position, self._ending, span)
        bos = self._bos
        if row.input_ids[: len(bos)] != bos:
            row = Row(bos + row.input_ids, [IGNORE] * len(bos) + row.labels, [False] * len(bos) + row.replayed)
        return row

    def encode_finished(self, spans: list[Span]) -> Row:
        """The row of a conversation that ends with an answer: its ending token stands there even where the history
        leaves it out, and no next turn is opened."""
        last = max(index for index, span in enumerate(spans) if span.answer)
        row = self.encode(spans[: last + 1] if isinstance(spans[last], EndOfTurn) else spans)
        if self._bos and row.input_ids[-1] == self._bos[-1]:
            row.cut()
        return row

    def _runs(self, spans: list[Span]) -> Iterator[list[Span] | Span]:
        """The spans in runs: lists of those that are encoded as one string, and each control token by itself."""
        run, in_answer = [], False
        for span in spans:
            starts = self.template.piecewise or span.answer and not in_answer
            in_answer = span.answer
            if starts and run:
                yield run
                run = []
            if not span.live or isinstance(span, EndOfTurn):
                run.append(span)
                continue
            for index, part in enumerate(self._parts(span.text)):
                if index % 2:
                    if run:
                        yield run
                        run = []
                    yield span._replace(text=part)
                elif part:
                    run.append(span._replace(text=part))
        if run:
            yield run

    def _add_text(self, row: Row, run: list[Span], backend) -> int:
        """Add a run, encoded as one string; the trained spans of a run come first. Returns where they end."""
        text = "".join([span.text for span in run])
        trained = sum([len(span.text) for span in run if span.trained])
        if not trained and all(span.live for span in run):
            new, count = self._literal(text, backend), 0
        else:
            encoding = backend.encode(text, add_special_tokens=False)
            new = encoding.ids
            count = bisect_left(encoding.offsets, trained, key=lambda offset: offset[0]) if trained else 0
            count = len(new) if trained == len(text) else count
        row.add(new[:count], run[0])
        row.add(new[count:], Span(""))
        return len(row.input_ids) - len(new) + count


def _text_backends(tokenizer, control: dict[str, int]) -> tuple:
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

    def copy(steps: dict) -> Tokenizer:
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


def _steps(step: dict | None) -> list[dict]:
    """A normalizer or pre-tokenizer, or the members of a Sequence of them."""
    if step is None:
        return []
    members = step.get("normalizers") or step.get("pretokenizers")
    return [each for member in members for each in _steps(member)] if members else [step]


def get_encoder(tokenizer, model_type: str | None = None) -> Encoder:
    """The encoder of a tokenizer, kept as long as nothing that it was made from changes: neither the chat template
    nor what is a special token, and which of them is eos."""
    special = tuple(tokenizer.special_tokens_map.items()), tuple(tokenizer.all_special_tokens), len(tokenizer)
    named = tuple(getattr(tokenizer, name, None) for name in ("chat_family", "chat_control_tokens", "add_bos_token"))
    return _make_encoder(tokenizer, model_type, str((tokenizer.chat_template, special, named)))


@lru_cache(maxsize=8)
def _make_encoder(tokenizer, model_type: str | None, state: str) -> Encoder:
    return Encoder(tokenizer, get_template(model_type, tokenizer))


def _encode_fitting(
    messages: Sequence[dict], tokenizer, model_type: str | None, multi_rounds: bool | None, max_length: int | None,
    drop_oldest: bool,
) -> Row:  # fmt: skip
    """The row of valid messages; with `multi_rounds` None, of the prompt that asks for an answer."""
    encoder = get_encoder(tokenizer, model_type)
    if messages[0]["role"] == "system" and not encoder.template.takes_system:
        raise TemplateError(
            f"Message 0 has role 'system', and template {encoder.template.name!r} has no place for it; expected "
            "user. Put the text into the first user message."
        )

    def encode(part: Sequence[dict]) -> Row:
        spans = encoder.template.render(part, multi_rounds is None, multi_rounds)
        return (encoder.encode_finished if part[-1]["role"] == "assistant" else encoder.encode)(spans)

    row, limit = encode(messages), max_length or tokenizer.model_max_length
    if len(row.input_ids) <= limit:
        return row
    return _encode_shorter(messages, encode, limit, drop_oldest, shortest=1 if multi_rounds is None else 2)


def _encode_shorter(messages: Sequence[dict], encode, limit: int, drop_oldest: bool, shortest: int) -> Row:
    """The row of a conversation that is longer than `limit`, without the oldest rounds if that is allowed, but with
    the last `shortest` messages. Raises LabelsError, naming the message that goes beyond, if none fits."""

    def fits(part: Sequence[dict]) -> bool:
        return len(encode(part).input_ids) <= limit

    system = messages[0]["role"] == "system"
    hint = "Pass drop_oldest=True to leave out its oldest rounds."
    if drop_oldest:
        starts = range(system, len(messages) - shortest + 1, 2)
        shorter = [[*messages[:system], *messages[start:]] for start in starts]
        if (first := bisect_left(shorter, True, key=fits)) < len(shorter):
            return encode(shorter[first])
        hint = "Not even its last round fits."
    turns = range(system, len(messages))
    over = turns[bisect_left(turns[:-1], True, key=lambda turn: not fits(messages[: turn + 1]))]
    raise LabelsError(
        f"The conversation is {len(encode(messages).input_ids)} tokens long: message {over} "
        f"({messages[over]['role']}) goes beyond the expected {limit}. {hint}"
    )


def encode_prompt(
    messages: Sequence[dict],
    tokenizer,
    model_type: str | None = None,
    max_length: int | None = None,
    drop_oldest: bool = False,
) -> list[int]:
    """The ids that inference sends for `messages`, which end with a user turn.

    Raises MessagesError, TemplateError, and LabelsError beyond `max_length` tokens (default: the tokenizer's
    `model_max_length`) unless `drop_oldest`, which leaves out whole rounds.
    """
    validate_messages(messages)
    if (role := messages[-1]["role"]) != "user":
        raise MessagesError(f"Message {len(messages) - 1} has role {role!r}; expected user, who asks for the answer.")
    return _encode_fitting(messages, tokenizer, model_type, None, max_length, drop_oldest).input_ids


def build_inputs_labels(
    messages: Sequence[dict],
    tokenizer,
    model_type: str | None = None,
    multi_rounds: bool = True,
    max_length: int | None = None,
    drop_oldest: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, two lists of the same length.

    Every assistant turn and the token that ends it is trained (`multi_rounds=False`: the last turn only);
    labels are -100 elsewhere. The ids before an answer are `encode_prompt` of the messages before it. Where a
    family keeps the ending token out of the history, it is the label of the token that follows the answer, as
    in Baichuan2's fine-tune.py. Errors and lengths as for `encode_prompt`; LabelsError also where nothing is
    trained.
    """
    row = encode_conversation(messages, tokenizer, model_type, multi_rounds, max_length, drop_oldest)
    return row.input_ids, row.labels


def encode_conversation(
    messages: Sequence[dict],
    tokenizer,
    model_type: str | None = None,
    multi_rounds: bool = True,
    max_length: int | None = None,
    drop_oldest: bool = False,
) -> Row:
    """What `build_inputs_labels` gives, and which of it is replayed."""
    validate_messages(messages)
    last = messages[-1]["role"]
    if last != "assistant" and not (multi_rounds and len(messages) > 2):
        raise LabelsError(f"Nothing is trained: message {len(messages) - 1} has role {last!r}; expected assistant.")
    return _encode_fitting(messages, tokenizer, model_type, multi_rounds, max_length, drop_oldest)
