"""Messages to the ids a model is sent, and to the labels it is trained on: one encoder for both."""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from ..conversation.messages import MessagesError, validate_messages
from ..errors import ChatmagicError
from .templates import EndOfTurn, Piece, TemplateError, control_pattern, get_template

IGNORE = -100  # torch.nn.functional.cross_entropy's ignore_index


class LabelsError(ChatmagicError):
    """A conversation that teaches nothing, or that is longer than the model's context."""


class Encoder:
    """Pieces of a template to token ids and labels.

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

    def __call__(self, pieces: list[Piece], finished: bool) -> tuple[list[int], list[int]]:
        """Token ids and labels, two lists of the same length. `finished`: the last turn is an answer, so that
        its ending token stands there even where the history leaves it out, and no next turn is opened."""
        if finished:
            last = max(index for index, piece in enumerate(pieces) if piece.answer)
            pieces = pieces[: last + 1] if isinstance(pieces[last], EndOfTurn) else pieces
        ids, labels, ends, run = [], [], [], []
        backend = self._fresh

        def flush() -> None:
            nonlocal backend
            if run:
                self._encode(run, backend, ids, labels, ends)
                run.clear()
                backend = self._joined

        in_answer = False
        for piece in pieces:
            if self.template.piecewise or piece.answer and not in_answer:
                flush()
            in_answer = piece.answer
            if not piece.live or isinstance(piece, EndOfTurn):
                run.append(piece)
                continue
            for index, part in enumerate(self._parts(piece.text)):
                if index % 2:
                    flush()
                    token = self._control[part.strip()]
                    ids.append(token)
                    labels.append(token if piece.trained else IGNORE)
                    backend = self._fresh if token in self._restart else self._joined
                elif part:
                    run.append(Piece(part, True, piece.answer, piece.trained))
        flush()
        for position in ends:
            if position == len(ids):
                ids.append(self._ending)
                labels.append(self._ending)
            labels[position] = self._ending
        bos = self._bos
        if finished and bos and ids[-1] == bos[-1]:
            del ids[-1], labels[-1]
        if ids[: len(bos)] != bos:
            ids, labels = bos + ids, [IGNORE] * len(bos) + labels
        return ids, labels

    def _encode(self, run: list[Piece], backend, ids: list[int], labels: list[int], ends: list[int]) -> None:
        """Append a run of pieces without control tokens, encoded as one string; trained ones come first.

        `ends` collects the positions after answers whose ending token stays out of the history.
        """
        text = "".join([piece.text for piece in run])
        spoken = sum([len(piece.text) for piece in run if piece.trained])
        if not spoken and all(piece.live for piece in run):
            new, count = self._literal(text, backend), 0
        else:
            encoding = backend.encode(text, add_special_tokens=False)
            new, count = encoding.ids, 0
            if spoken == len(text):
                count = len(new)
            elif spoken:
                count = bisect_left(encoding.offsets, spoken, key=lambda span: span[0])
        if any(piece.trained and isinstance(piece, EndOfTurn) for piece in run):
            ends.append(len(ids) + count)
        ids += new
        labels += new[:count] + [IGNORE] * (len(new) - count)


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


@lru_cache(maxsize=8)
def _encoder(tokenizer, model_type: str | None, chat_template: str) -> Encoder:
    return Encoder(tokenizer, get_template(model_type, tokenizer))


def _encode(messages, tokenizer, model_type, max_length, drop_oldest, multi_rounds=None):
    """Ids and labels of valid messages, a prompt's if `multi_rounds` is None; with `drop_oldest`, without the
    oldest rounds that do not fit."""
    encoder = _encoder(tokenizer, model_type, str(tokenizer.chat_template))
    template = encoder.template
    if (system := messages[0]["role"] == "system") and not template.takes_system:
        raise TemplateError(
            f"Message 0 has role 'system', and template {template.name!r} has no place for it; expected "
            "user. Put the text into the first user message."
        )

    def encode(part: Sequence[dict]) -> tuple[list[int], list[int]]:
        return encoder(template.render(part, multi_rounds is None, multi_rounds), part[-1]["role"] == "assistant")

    def fits(part: Sequence[dict]) -> bool:
        return len(encode(part)[0]) <= limit

    encoded, limit = encode(messages), max_length or tokenizer.model_max_length
    if len(encoded[0]) <= limit:
        return encoded
    hint = "Pass drop_oldest=True to leave out its oldest rounds."
    if drop_oldest:
        shortest = 1 if multi_rounds is None else 2
        starts = range(system, len(messages) - shortest + 1, 2)
        shorter = [[*messages[:system], *messages[start:]] for start in starts]
        if (first := bisect_left(shorter, True, key=fits)) < len(shorter):
            return encode(shorter[first])
        hint = "Not even its last round fits."
    turns = range(system, len(messages))
    over = turns[bisect_left(turns[:-1], True, key=lambda turn: not fits(messages[: turn + 1]))]
    raise LabelsError(
        f"The conversation is {len(encoded[0])} tokens long: message {over} ({messages[over]['role']}) goes "
        f"beyond the expected {limit}. {hint}"
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
    return _encode(messages, tokenizer, model_type, max_length, drop_oldest)[0]


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
    validate_messages(messages)
    last = messages[-1]["role"]
    if last != "assistant" and not (multi_rounds and len(messages) > 2):
        raise LabelsError(f"Nothing is trained: message {len(messages) - 1} has role {last!r}; expected assistant.")
    return _encode(messages, tokenizer, model_type, max_length, drop_oldest, multi_rounds)
