"""Messages to the ids a model is sent, and to the labels it is trained on: one encoder for both."""

import json
import re
from collections.abc import Sequence
from functools import cache
from weakref import WeakKeyDictionary

from .errors import ChatmagicError
from .messages import MessagesError, validate_messages
from .templates import Piece, get_template

IGNORE = -100


class LabelsError(ChatmagicError):
    """A conversation from which nothing would be learnt, or that does not fit."""


class Encoder:
    """Pieces to ids and labels with one tokenizer and one template.

    Text is encoded by a copy of the tokenizer's backend in which control tokens match nothing: they are all
    marked special, and special tokens are skipped (`encode_special_tokens`). Template and words that
    touch are encoded as one string, as the publishers do, but for an answer, which always starts a new piece: so the
    ids before it do not depend on it.
    """

    def __init__(self, tokenizer, template):
        self.control = template.control_tokens(tokenizer)
        self.eos = template.stop_token_ids(tokenizer)[0]
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")")
        self._text = _text_backend(tokenizer.backend_tokenizer, self.control)
        self._parts = cache(self._split.split)
        self._literal = cache(lambda text: self._text.encode(text, add_special_tokens=False).ids)

    def __call__(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Token ids and labels (-100 where nothing is trained) of the same length."""
        ids, labels, run = [], [], []

        def flush():
            if run:
                self._encode_run(run, ids, labels)
                run.clear()

        for text, live, trained in pieces:
            if run and trained and not run[-1][2]:
                flush()
            if not live:
                run.append((text, live, trained))
                continue
            for index, part in enumerate(self._parts(text)):
                if index % 2:
                    flush()
                    ids.append(self.control[part])
                    labels.append(self.control[part] if trained else IGNORE)
                elif part:
                    run.append((part, live, trained))
        flush()
        return ids, labels

    def _encode_run(self, run, ids, labels):
        """One string without control tokens; `run` is trained first, if at all, then not."""
        text = "".join(part[0] for part in run)
        if all(part[1] for part in run) and not run[0][2]:
            new = self._literal(text)
            ids += new
            labels += [IGNORE] * len(new)
            return
        encoding = self._text.encode(text, add_special_tokens=False)
        ids += encoding.ids
        trained = sum(len(part[0]) for part in run if part[2])
        if not trained:
            labels += [IGNORE] * len(encoding.ids)
        elif trained == len(text):
            labels += encoding.ids
        else:
            labels += [
                token if start < trained else IGNORE
                for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            ]


def _text_backend(backend, control: dict[str, int]):
    """A copy of a `tokenizers.Tokenizer` that reads control tokens as ordinary characters."""
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in control
    copy = Tokenizer.from_str(json.dumps(spec | {"truncation": None, "padding": None}))
    copy.encode_special_tokens = True
    return copy


_ENCODERS: WeakKeyDictionary = WeakKeyDictionary()


def _encoder(tokenizer, model_type: str | None):
    """The template and its encoder, built once for a tokenizer and again when its vocabulary has grown."""
    made = _ENCODERS.setdefault(tokenizer, {})
    key = model_type, len(tokenizer), getattr(tokenizer, "chat_template", None)
    if key not in made:
        template = get_template(model_type, tokenizer)
        made[key] = template, Encoder(tokenizer, template)
    return made[key]


def encode_prompt(messages: Sequence[dict], tokenizer, model_type: str | None = None) -> list[int]:
    """The ids that inference sends for `messages`, which end with a user turn."""
    validate_messages(messages)
    if (role := messages[-1]["role"]) != "user":
        raise MessagesError(f"Message {len(messages) - 1} has role {role!r}; a prompt ends with user.")
    template, encode = _encoder(tokenizer, model_type)
    return encode(template.render(messages))[0]


def build_inputs_labels(
    messages: Sequence[dict], tokenizer, model_type: str | None = None, multi_rounds: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, two lists of the same length.

    Every assistant turn and the token that ends it is trained (`multi_rounds=False`: the last one only); labels
    are -100 elsewhere. The ids before an answer are `encode_prompt` of the messages before it.
    """
    validate_messages(messages)
    template, encode = _encoder(tokenizer, model_type)
    ids, labels = encode(template.render(messages, add_generation_prompt=False, multi_rounds=multi_rounds))
    if all(label == IGNORE for label in labels):
        raise LabelsError(f"Nothing is trained in this conversation of {len(messages)} messages: no assistant turn.")
    return ids, labels
