"""The spans of a template to the ids a model is sent, and to the labels it is trained on: one encoder for both."""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .templates import EndOfTurn, Span, TemplateError, control_pattern, get_template

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from .own import OwnTemplate
    from .templates import Template

IGNORE = -100  # torch.nn.functional.cross_entropy's ignore_index


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
