"""A tokenizer's own chat template (Jinja), with the trained spans found by comparing renderings.

transformers can find them (`return_assistant_tokens_mask`) only where a template marks them with `{%
generation %}`, which few do, and not together with `sanitize_control_tokens`, which encodes a control token
in a message apart from its neighbours.
"""

import re
from collections.abc import Sequence
from functools import cache

from .templates import EndOfTurn, Span, Template, TemplateError, control_pattern, control_tokens, is_trained

# Private-use characters go through Jinja with the messages: one for each control token in them, and two
# around an answer. They tell afterwards which control tokens are the template's, and where the answers are.
_PRIVATE = "[\U00100000-\U0010fffd]"
_FIRST_STAND_IN, _BEGIN, _END = 0x100000, "\U0010fffc", "\U0010fffd"
_ANSWER = re.compile(f"{_BEGIN}([^{_BEGIN}{_END}]*){_END}")


class OwnTemplate:
    """The format that a tokenizer carries in `chat_template`; the interface is that of `Template`."""

    name = "chat_template"
    takes_system = True
    bos = end = ""
    piecewise = False
    stop_strings = ()

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        control = self.control_tokens(tokenizer)
        self._hide = re.compile("|".join([*map(re.escape, sorted(control, key=len, reverse=True)), _PRIVATE]))
        self._end = re.compile(rf"\s*(?:{control_pattern(tokenizer, control)})")
        self._joint = cache(self._learn_joint)

    def control_tokens(self, tokenizer) -> dict[str, int]:
        return control_tokens(tokenizer, tokenizer.get_chat_template())

    def stop_token_ids(self, tokenizer) -> list[int]:
        """The ids that end a generation, first the one that training teaches."""
        control = self.control_tokens(tokenizer)
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ends = [control.get(span.text.strip()) for span in self.render(turn) if span.answer and span.live]
        return [token for token in dict.fromkeys([*ends, tokenizer.eos_token_id]) if token is not None]

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = True, multi_rounds: bool | None = None
    ) -> list[Span]:
        """As `Template.render`. Raises TemplateError where an answer that is to be trained does not follow
        the prompt that asks for it, as in templates that rewrite earlier turns; and for a system text without
        a place.
        """
        hidden, shown = self._hidden(messages)
        (full,) = self._jinja([hidden], add_generation_prompt and hidden[-1]["role"] == "user")
        if hidden[0]["role"] == "system" and hidden[0]["content"].strip() not in full:
            raise TemplateError(
                "Message 0 has role 'system', and this chat template has no place for it; expected user."
            )
        turns = [index for index, message in enumerate(hidden) if message["role"] == "assistant"]
        answers = list(_ANSWER.finditer(full))
        if len(answers) != len(turns):
            answers = [None] * len(turns)
        spans, start = [], 0
        for index, answer in zip(turns, answers, strict=True):
            last = index + 1 == len(hidden)
            trained, replayed = is_trained(last, multi_rounds, hidden[index]), hidden[index].get("replayed", False)
            cut = answer and self._cut(full, answer, hidden[: index + 1], last)
            if trained and cut is None:
                raise TemplateError(
                    f"Message {index} (assistant) cannot be trained: this chat template rewrites earlier "
                    "turns, so that the prompt which asks for it is not how the conversation begins. "
                    "Expected one that only appends: pass multi_rounds=False, or another model_type."
                )
            if cut is not None:
                end = self._end.match(full, answer.end())
                spans += _split(full[start:cut], shown)
                spans += _split(full[cut : answer.start()], shown, True, trained, replayed)
                words = "".join([shown.get(char, char) for char in answer[1]])
                spans.append(Span(words, False, True, trained, replayed))
                spans.append((Span if end else EndOfTurn)(end[0] if end else "", True, True, trained, replayed))
                start = (end or answer).end()
        return spans + _split(full[start:], shown)

    def writes_like(self, template: Template) -> bool:
        """Whether the two write the same prompts, judged by one with and one without a system text."""
        turns = [{"role": role, "content": f" {role}\n"} for role in ("system", "user", "assistant", "user")]
        try:
            own, other = (
                ["".join(span.text for span in writer.render(probe)) for probe in (turns, turns[1:])]
                for writer in (self, template)
            )
        except TemplateError:
            return False
        return own == [(template.bos or "") + prompt for prompt in other]

    def _cut(self, full: str, answer: re.Match, messages: list[dict], last: bool) -> int | None:
        """Where in `full` the last of `messages` begins, as the prompt that asks for it leaves off; None if
        it does not follow that prompt."""
        if last:
            (prompt,) = self._jinja([messages[:-1]], True)
            return len(prompt) if full.startswith(prompt) else None
        joint, keeps_space = self._joint(messages[0]["role"] == "system")
        if joint is None:
            return None
        if keeps_space:
            joint += messages[-1]["content"].partition(_BEGIN)[0]
        return answer.start() - len(joint) if full.endswith(joint, 0, answer.start()) else None

    def _learn_joint(self, system: bool) -> tuple[str | None, bool]:
        """What stands between prompts and their answers, None if the template rewrites earlier turns, and
        whether it keeps the whitespace before an answer.

        Learnt once, for it takes time, from the renderings of a growing conversation: if each of its
        beginnings, with the prompt for an answer and without, is how the whole begins, the template only
        appends.
        """
        roles = ["system"] * system + ["user", "assistant"] * 3
        turns, _ = self._hidden([{"role": role, "content": role} for role in roles])
        turns[-1]["content"] = " " + turns[-1]["content"]
        *beginnings, full = self._jinja([turns[: end + 1] for end in range(system, len(turns))], False)
        prompts = self._jinja([turns[:end] for end in range(system + 1, len(turns), 2)], True)
        answers = list(_ANSWER.finditer(full))
        if len(answers) != 3 or not all(map(full.startswith, beginnings + prompts)):
            return None, False
        first, second, spaced = (
            full[len(prompt) : answer.start()] for prompt, answer in zip(prompts, answers, strict=True)
        )
        return (first if first == second and spaced in (first, first + " ") else None), spaced != first

    def _jinja(self, conversations: list[Sequence[dict]], add_generation_prompt: bool) -> list[str]:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise TemplateError(f"The tokenizer's chat template refuses the conversation: {error}") from error

    def _hidden(self, messages: Sequence[dict]) -> tuple[list[dict], dict[str, str]]:
        """The messages with the private characters in them, and what each of those stands for."""
        stand_ins = {}

        def hide(match: re.Match) -> str:
            return stand_ins.setdefault(match[0], chr(_FIRST_STAND_IN + len(stand_ins)))

        hidden = []
        for message in messages:
            text = self._hide.sub(hide, message["content"])
            if message["role"] == "assistant":  # the whitespace around it stays outside: templates strip it
                words = text.strip()
                before, _, after = text.partition(words) if words else (text, "", "")
                text = before + _BEGIN + words + _END + after
            hidden.append({**message, "content": text})
        return hidden, {char: text for text, char in stand_ins.items()} | {_BEGIN: "", _END: ""}


def _split(text: str, shown: dict[str, str], *marks: bool) -> list[Span]:
    """Text that the template wrote, as spans with these `marks` (answer, trained, replayed); the private characters
    in it are someone's words."""
    spans = [Span(shown.get(part, part), part not in shown, *marks) for part in re.split(f"({_PRIVATE})", text)]
    return [span for span in spans if span.text]
