"""A tokenizer's own chat template (Jinja), with the trained spans found by comparing renderings.

transformers can find them (`return_assistant_tokens_mask`) only where a template marks them with
`{% generation %}`, which few do, and not together with `sanitize_control_tokens`.
"""

import re
from collections.abc import Sequence

from . import END_OF_TURN, Piece, TemplateError, control_tokens

# Control tokens in a message pass through Jinja as one character each of the last private-use plane.
_PRIVATE = range(0x100000, 0x10FFFE)


class OwnTemplate:
    """The format that a tokenizer carries in `chat_template`; the interface is `Template`'s."""

    stop_strings = ()

    def __init__(self, tokenizer):
        self.name = "chat_template"
        self._tokenizer = tokenizer
        control = "|".join(map(re.escape, self.control_tokens(tokenizer)))
        self._hide = re.compile(f"{control}|[{chr(_PRIVATE[0])}-{chr(_PRIVATE[-1])}]")
        self._end = re.compile(rf"\s*(?:{control})")

    def control_tokens(self, tokenizer) -> dict[str, int]:
        return control_tokens(tokenizer, tokenizer.chat_template)

    def stop_token_ids(self, tokenizer) -> list[int]:
        return [tokenizer.eos_token_id]

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = True, multi_rounds: bool = True
    ) -> list[Piece]:
        """Valid messages as pieces. Raises TemplateError where an answer that is to be trained stands in a
        place that the prompt before it does not lead to, as with templates that rewrite earlier turns."""
        hidden, shown = self._hidden(messages)
        asks = add_generation_prompt and messages[-1]["role"] == "user"
        full = self._jinja(hidden, asks)
        pieces, position = [], 0

        def add(end: int, live: bool, trained: bool) -> None:
            nonlocal position
            if live:
                pieces.extend(_split(full[position:end], shown, trained))
            elif end > position:
                pieces.append(Piece("".join(shown.get(c, c) for c in full[position:end]), False, trained))
            position = end

        for index, message in enumerate(hidden):
            if message["role"] == "system" and message["content"].strip() not in full:
                raise TemplateError(f"Message {index} is a system text, and this chat template has no slot for it.")
            if message["role"] != "assistant":
                continue
            prompt = self._jinja(hidden[:index], True)
            wanted = multi_rounds or index + 1 == len(messages)
            answer = full.find(message["content"].strip(), len(prompt))
            if not full.startswith(prompt) or answer < 0:
                if not wanted:
                    continue
                raise TemplateError(
                    f"Message {index} (assistant) cannot be trained: this chat template rewrites earlier turns, so "
                    "the prompt before the answer is not how the conversation begins. Use multi_rounds=False, or "
                    "another model_type."
                )
            add(len(prompt), live=True, trained=False)
            add(answer, live=True, trained=wanted)
            words = answer + len(message["content"].strip())
            end = self._end.match(full, words)
            add(end.start() if end else words, live=False, trained=wanted)
            if end:
                add(end.end(), live=True, trained=wanted)
            else:
                pieces.append(END_OF_TURN._replace(trained=wanted))
        add(len(full), live=True, trained=False)
        return pieces

    def _jinja(self, messages: Sequence[dict], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _hidden(self, messages: Sequence[dict]) -> tuple[list[dict], dict[str, str]]:
        """The messages with every control token replaced by a private character, and what each stands for."""
        stand_ins = {}

        def hide(match: re.Match) -> str:
            return stand_ins.setdefault(match[0], chr(_PRIVATE[len(stand_ins)]))

        hidden = [{**message, "content": self._hide.sub(hide, message["content"])} for message in messages]
        return hidden, {char: text for text, char in stand_ins.items()}


def _split(text: str, shown: dict[str, str], trained: bool) -> list[Piece]:
    """Live text in which the private characters are someone's words."""
    if not shown:
        return [Piece(text, True, trained)] if text else []
    parts = re.split(f"([{''.join(shown)}])", text)
    return [Piece(shown.get(part, part), part not in shown, trained) for part in parts if part]
