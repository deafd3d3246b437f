"""What a model is trained on, token by token, in colours: HTML in a notebook, ANSI in a terminal."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from ..conversation.messages import Message
from ..text import visible
from .encoder import IGNORE
from .labels import build_inputs_labels
from .templates import get_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Name of a kind of token: CSS, ANSI. Black or white text, so that light and dark themes both show it.
STYLES = {
    "trained": ("background:#2da44e;color:#fff", "42;30"),
    "masked": ("background:#d0d7de;color:#000", "47;30"),
    "trained control": ("background:#116329;color:#fff;font-weight:bold", "1;42;35"),
    "control": ("background:#8250df;color:#fff", "45;97"),
    "padding": ("background:#57606a;color:#fff", "100;97"),
}


class Group(NamedTuple):
    """Neighbouring tokens that make whole characters together, all of one kind."""

    kind: str
    text: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


class LabelPicture:
    """The groups of one row; a notebook shows them as HTML, `print` with ANSI colours."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def _repr_html_(self) -> str:
        def span(kind: str, text: str, title: str) -> str:
            style = f"{STYLES[kind][0]};border-radius:3px;padding:1px;margin:1px"
            return f'<span style="{style}" title="{escape(title)}">{escape(text)}</span>'

        legend = " ".join(span(kind, f"{kind} {count}", kind) for kind, count in self._counts())
        body = "".join(
            span(group.kind, group.text.replace("\n", "↵"), f"{group.kind}, ids {_numbers(group)}")
            + "<br>" * group.text.count("\n")
            for group in self.groups
        )
        return f'<div style="line-height:1.9;white-space:pre-wrap">{legend}<br>{body}</div>'

    def __repr__(self) -> str:
        def paint(kind: str, text: str) -> str:
            return f"\x1b[{STYLES[kind][1]}m{text}\x1b[0m"

        legend = " ".join(paint(kind, f"{kind} {count}") for kind, count in self._counts())
        body = "".join(
            paint(group.kind, group.text.replace("\n", "↵")) + "\n" * group.text.count("\n") for group in self.groups
        )
        return f"{legend}\n{body}"

    def _counts(self) -> list[tuple[str, int]]:
        counts = {kind: sum(len(group.input_ids) for group in self.groups if group.kind == kind) for kind in STYLES}
        return [(kind, count) for kind, count in counts.items() if count]


def show_labels(
    example: Sequence[Message] | dict[str, Any], tokenizer: "PreTrainedTokenizerBase", model_type: str | None = None
) -> LabelPicture:
    """The picture of an `example`: of a conversation (a list of messages), or of a row of a batch, a dict with
    `input_ids`, `labels` and, if it has padding, `attention_mask`, each a list or a tensor of shape (length,).
    tokenizer, model_type: as for `encode_prompt`."""
    if isinstance(example, dict):
        ids, labels = ([int(each) for each in example[key]] for key in ("input_ids", "labels"))
        mask = [int(each) for each in example.get("attention_mask", [1] * len(ids))]
    else:
        ids, labels = build_inputs_labels(example, tokenizer, model_type)
        mask = [1] * len(ids)
    control = set(get_template(model_type, tokenizer).control_tokens(tokenizer).values())

    def kind(token: tuple[int, int, int]) -> str:
        token_id, label, attended = token
        if not attended:
            return "padding"
        names = ["trained"] * (label != IGNORE) + ["control"] * (token_id in control)
        return " ".join(names) or "masked"

    groups: list[Group] = []
    for name, tokens in groupby(zip(ids, labels, mask, strict=True), kind):
        groups += _whole_characters(name, list(tokens), groups[-1:], tokenizer, control)
    return LabelPicture(groups)


def _whole_characters(
    kind: str,
    tokens: list[tuple[int, int, int]],
    before: list[Group],
    tokenizer: "PreTrainedTokenizerBase",
    control: set[int],
) -> list[Group]:
    """Tokens of one kind, split after every token that ends a character: a Chinese one may take several."""
    if kind == "padding":
        ids, labels, _ = zip(*tokens, strict=True)
        return [Group(kind, f"{tokenizer.convert_ids_to_tokens(ids[0])} × {len(ids)}", ids, labels)]
    groups: list[Group] = []
    start = 0
    for end, (token_id, _, _) in enumerate(tokens, 1):
        ids, labels, _ = zip(*tokens[start:end], strict=True)
        if token_id in control:
            text = tokenizer.convert_ids_to_tokens(token_id)
        else:
            # Decoded behind its neighbour: a decoder drops the space that a text begins with.
            neighbour = [token for group in [*before, *groups][-1:] for token in group.input_ids]
            known = tokenizer.decode(neighbour, skip_special_tokens=False)
            text = tokenizer.decode([*neighbour, *ids], skip_special_tokens=False)[len(known) :]
        if end == len(tokens) or not text.endswith("\ufffd"):
            groups.append(Group(kind, visible(text), ids, labels))
            start = end
    return groups


def _numbers(group: Group) -> str:
    """The ids of a group, and the label of a token that teaches another than itself."""
    other = [label for token, label in zip(group.input_ids, group.labels, strict=True) if label not in (token, IGNORE)]
    return " ".join(map(str, group.input_ids)) + (f", trained as {other[0]}" if other else "")
