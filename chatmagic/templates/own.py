"""A tokenizer's own chat template (Jinja), with the trained spans found by comparing renderings.

transformers can find them (`return_assistant_tokens_mask`) only where a template marks them with
`{% generation %}`, which few do, and not together with `sanitize_control_tokens`.
"""

import re
from collections.abc import Sequence

from . import EndOfTurn, Piece, Template, TemplateError, control_tokens

# Control tokens in a message pass through Jinja as one character each of the last private-use plane.
_PRIVATE = range(0x100000, 0x10FFFE)


class OwnTemplate:
    """The format that a tokenizer carries in `chat_template`; the interface is that of `Template`."""

    name = "chat_template"
    takes_system = True
    bos = ""
    piecewise = False
    stop_strings = ()

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        control = "|".join(map(re.escape, self.control_tokens(tokenizer))) or "(?!)"
        self._hide = re.compile(f"{control}|[{chr(_PRIVATE[0])}-{chr(_PRIVATE[-1])}]")
        self._end = re.compile(rf"\s*(?:{control})")

    def control_tokens(self, tokenizer) -> dict[str, int]:
        return control_tokens(tokenizer, tokenizer.chat_template)

    def stop_token_ids(self, tokenizer) -> list[int]:
        """The ids that end a generation, first the one that training teaches."""
        control = self.control_tokens(tokenizer)
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ends = [piece.text.strip() for piece in self.render(turn) if piece.trained and piece.live]
        return list(dict.fromkeys([control[end] for end in ends if end in control] + [tokenizer.eos_token_id]))

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = True, multi_rounds: bool = True
    ) -> list[Piece]:
        """Valid messages as pieces; their texts, joined, are the prompt.

        Raises TemplateError where an answer that is to be trained does not follow the prompt that asks for it, as in
        templates that rewrite earlier turns, and where the template has no place for a system text.
        """
        hidden, shown = self._hidden(messages)
        answers = [index for index, message in enumerate(hidden) if message["role"] == "assistant"]
        full = self._jinja([hidden], add_generation_prompt and hidden[-1]["role"] == "user")[0]
        if hidden[0]["role"] == "system" and hidden[0]["content"].strip() not in full:
            raise TemplateError("Message 0 has role 'system', and this chat template has no place for it.")
        pieces, start = [], 0
        for index, prompt in zip(answers, self._jinja([hidden[:index] for index in answers], True), strict=True):
            trained = multi_rounds or index + 1 == len(hidden)
            words = hidden[index]["content"].strip()
            place = full.find(words, len(prompt)) if full.startswith(prompt) else -1
            if place < 0 and trained:
                raise TemplateError(
                    f"Message {index} (assistant) cannot be trained: this chat template rewrites earlier turns, so the "
                    "prompt that asks for it is not how the conversation begins. Expected a template that only "
                    "appends: pass multi_rounds=False, or another model_type."
                )
            if place < 0:
                continue
            stop = place + len(words)
            end = self._end.match(full, stop)
            spoken = end.start() if end else stop
            pieces += _split(full[start : len(prompt)], shown, trained=False)
            pieces += _split(full[len(prompt) : place], shown, trained)
            pieces.append(Piece("".join(shown.get(char, char) for char in full[place:spoken]), False, trained))
            pieces.append(Piece(end[0].lstrip(), True, trained) if end else EndOfTurn("", True, trained))
            start = end.end() if end else stop
        return pieces + _split(full[start:], shown, trained=False)

    def writes_like(self, template: Template) -> bool:
        """Whether the two write the same prompts, judged by one with and one without a system text."""
        turns = [{"role": role, "content": f" {role}\n"} for role in ("system", "user", "assistant", "user")]
        try:
            return all(
                self._jinja([probe], True)[0] == (template.bos or "") + "".join(p.text for p in template.render(probe))
                for probe in (turns, turns[1:])
            )
        except TemplateError:
            return False

    def _jinja(self, conversations: list[Sequence[dict]], add_generation_prompt: bool) -> list[str]:
        if not conversations:
            return []
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise TemplateError(f"The tokenizer's chat template refuses the conversation: {error}") from error

    def _hidden(self, messages: Sequence[dict]) -> tuple[list[dict], dict[str, str]]:
        """The messages with every control token replaced by a private character, and what each stands for."""
        stand_ins = {}

        def hide(match: re.Match) -> str:
            return stand_ins.setdefault(match[0], chr(_PRIVATE[len(stand_ins)]))

        hidden = [{**message, "content": self._hide.sub(hide, message["content"])} for message in messages]
        return hidden, {char: text for text, char in stand_ins.items()}


def _split(text: str, shown: dict[str, str], trained: bool) -> list[Piece]:
    """Text that the template wrote; the private characters in it are someone's words."""
    parts = re.split(f"([{''.join(shown)}])", text) if shown else [text]
    return [Piece(shown.get(part, part), part not in shown, trained) for part in parts if part]
