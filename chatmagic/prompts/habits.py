"""What a chat template does with thoughts, endings and earlier turns: learnt once, by rendering a few conversations."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from ..conversation.messages import Message
from .jinja import ANSWER, TAG, THOUGHT, THOUGHT_END, Renderer
from .templates import TemplateError

KEY = "reasoning_content"  # where transformers' templates look for a thought; it also fills in what gpt-oss reads
_KEYS = (KEY, "reasoning", "thinking")
_SWITCHES = (  # what templates are told to think or not by: name, value for on, value for off
    ("enable_thinking", True, False),
    ("thinking", True, False),
    ("thinking_mode", "enabled", "disabled"),
    ("thinking_option", "on", "off"),
    ("skip_thinking", False, True),
    ("skip_think", False, True),
    ("thinking_budget", None, 0),
    ("reasoning_effort", None, "none"),
    ("reasoning_effort", "high", "no_think"),
)
_LEADING = re.compile(r"\s*<((?:\w+:)?think(?:ing)?)>(.*?)</\1>\s*", re.DOTALL)
_ASKS, _SAYS, _THINKS, _NEXT = "Who are you?", "I am here.", "They ask who I am.", "And then?"


def split_thoughts(messages: Sequence[Message], tagged: bool = True) -> list[Message]:
    """The messages, the thought of an answer under KEY: that under another key, and if `tagged` what its content begins
    with in <think>...</think>. What only mentions a tag stays."""
    found = []
    for message in messages:
        if message["role"] == "assistant":
            thought = next((message[key] for key in _KEYS if message.get(key)), None)
            message = {key: value for key, value in message.items() if key not in _KEYS}
            if tagged and thought is None and (match := _LEADING.match(message["content"])):
                thought, message["content"] = match[2], message["content"][match.end() :]
            if thought is not None and thought.strip():
                message[KEY] = thought
        found.append(message)
    return found


@dataclass
class Habits:
    """What was learnt of a template.

    style   how it is told a thought, see `Renderer.hide`
    knows   whether it knows thoughts at all
    open    what stands before a thought where the prompt has not opened it
    opening what a model writes to begin a thought, as far as its template shows
    close   what stands between a thought and the words
    ending  what the model says last, trained; empty: the tokenizer's eos, which stays out of the history
    stops   the tokens that end a generation, first the last of the ending
    on, off what the template is given for thinking=True and False, both empty if it cannot be told
    begun   what prompts may end with that their answers, written later, lack
    states  whether a prompt leaves off in an "opened" thought, after a "closed" one or "free" of any, by `thinking`
    """

    style: str | None = None
    knows: bool = False
    open: str = ""
    opening: str = ""
    close: str = ""
    ending: str = ""
    stops: list[str] = field(default_factory=list)
    on: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] = field(default_factory=dict)
    states: dict[bool | None, str] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    control: re.Pattern[str] = re.compile("(?!)")

    def switches(self, thinking: bool | None) -> dict[str, Any]:
        """What to give the template. Raises TemplateError where it cannot be told so."""
        if thinking and not self.knows and not self.on:
            raise TemplateError("thinking=True: this chat template knows no thoughts. Leave thinking out.")
        if thinking is False and self.states[False] == "opened":
            raise TemplateError(
                "thinking=False: this chat template opens a thought in every prompt, and cannot be told not to. Leave "
                "thinking out, or pass another model_type."
            )
        return {None: {}, True: self.on, False: self.off}[thinking]

    def closing(self) -> str:
        """The token, or the text, by which a thought is known to be closed."""
        return self._first(self.close)

    def _first(self, text: str) -> str:
        found = self.control.search(text) or TAG.search(text)
        return found[0].strip() if found else text.strip()


def learn_habits(jinja: Renderer) -> Habits:
    """Render a few conversations of one and two rounds, with and without a thought."""
    habits = Habits(control=jinja.control)
    _learn_endings(habits, jinja)
    _learn_switches(habits, jinja)
    _learn_thoughts(habits, jinja)
    habits.opening = _opening(habits, jinja)
    for thinking, switches in ((None, {}), (True, habits.on), (False, habits.off)):
        habits.states[thinking] = _state(habits, jinja, switches) if habits.knows else "free"
        prompt, text = jinja(_talk(jinja)[:1], True, **switches), jinja(_talk(jinja), False, **switches)
        habits.begun.add(prompt[jinja.common(prompt, text) :])
    if habits.states[False] == "opened":
        habits.off = {}  # it says something else then, and lets the model think all the same
    return habits


def _talk(jinja: Renderer, style: str | None = None, more: bool = False) -> list[Message]:
    """A question and its answer, with a thought if a `style` says how, and with the next question."""
    turns = [{"role": "user", "content": _ASKS}, {"role": "assistant", "content": _SAYS}]
    if style:
        turns[1][KEY] = _THINKS
    return jinja.hide(turns + [{"role": "user", "content": _NEXT}] * more, style).messages


def _after_question(text: str) -> str:
    return text[text.rfind(_ASKS) + len(_ASKS) :]


def _learn_endings(habits: Habits, jinja: Renderer) -> None:
    """The ending is what follows the words of an answer, as far as no next turn begins there: control tokens side by
    side, with what leads to them."""
    last, middle = jinja(_talk(jinja), False), jinja(_talk(jinja, more=True), False)
    in_last, in_middle = ANSWER.search(last), ANSWER.search(middle)
    if not in_last or not in_middle:
        return
    header = last[last.find(_ASKS) + len(_ASKS) : in_last.start()]
    before = middle[: middle.find(_ASKS)]
    behind_last, behind = last[in_last.end() :], middle[in_middle.end() :].partition(_NEXT)[0]
    # A user's turn begins as the first one does; what ends the turn before that one is no part of it.
    opening = commonprefix([before[::-1], behind[::-1]])[::-1]
    start = len(behind) - len(opening)  # inside a token where two end alike, <|a_end|> and <|b_end|>
    opening = behind[next((m.end() for m in jinja.control.finditer(behind) if m.start() < start < m.end()), start) :]
    tokens = [token.strip() for token in jinja.control.findall(header)]
    if tokens and opening.lstrip().startswith(tokens[0]):
        opening = opening.lstrip()[len(tokens[0]) :]
    between = behind.removesuffix(opening)
    if behind_last.strip() and behind.startswith(behind_last):
        between, opening = behind_last, behind[len(behind_last) :]
    openers = {jinja.bos or ""} | {token.strip() for token in jinja.control.findall(opening)} | set(tokens[1:])
    regions = commonprefix([behind_last, between]), behind_last, between
    habits.ending = next(filter(None, (_ending(jinja.control, region, openers) for region in regions)), "")
    if (
        behind_last.strip() == between.strip()
        and jinja.bos not in jinja.control.findall(between)
        and re.search(rf"(?:{jinja.control.pattern})\s*$", between)
    ):
        habits.ending = between if between.endswith(habits.ending) else between.rstrip()
    if found := list(jinja.control.finditer(habits.ending)):  # the first of what stops a reply ends it
        first = next(token for token in found if token[0].strip() == found[-1][0].strip())
        habits.ending = habits.ending[: first.end()]
    habits.stops = jinja.control.findall(habits.ending)[-1:] or jinja.control.findall(opening)[:1]
    habits.stops = [token.strip() for token in habits.stops]


def _ending(control: re.Pattern[str], text: str, openers: set[str]) -> str:
    """The control tokens side by side with which a text begins, and what leads to the first of them; but none that
    opens a turn."""
    found = list(control.finditer(text))
    end = 0
    for before, token in zip([None, *found], found):
        if token[0].strip() in openers or before and before.end() != token.start():
            break
        end = token.end()
    return text[:end]


def _learn_switches(habits: Habits, jinja: Renderer) -> None:
    question = _talk(jinja)[:1]
    plain = jinja(question, True)
    for name, on, off in _SWITCHES:
        if name in habits.off or not re.search(rf"\b{name}\b", jinja.source):
            continue
        try:
            prompts = [jinja(question, True, **({name: value} if value is not None else {})) for value in (on, off)]
        except TemplateError:  # of a value that it does not know
            continue
        if prompts[0] == prompts[1] or isinstance(off, str) and prompts[1].count(off) > plain.count(off):
            continue
        if name == "reasoning_effort" and prompts[1] == plain and not re.search(rf"['\"]{off}['\"]", jinja.source):
            continue  # it knows efforts, but not this one
        habits.off[name] = off
        if on is not None:
            habits.on[name] = on


def _learn_thoughts(habits: Habits, jinja: Renderer) -> None:
    tagged = "</think>" in jinja.source
    for style in ("key", "content") if tagged else ("key",):
        try:
            text = _after_question(jinja(_talk(jinja, style), False, **habits.on))
        except TemplateError:
            continue
        answer = ANSWER.search(text)
        if answer and THOUGHT in text[: answer.start()]:
            opening = TAG.findall(text[: text.index(THOUGHT)])
            if style == "key" or opening in ([], ["<think>"]):  # else it takes the tags for words, and adds its own
                habits.style, habits.knows = style, True
                habits.close = text[text.index(THOUGHT_END) + 1 : answer.start()]
                return
        elif style == "content":
            habits.style = style  # it drops the thought, as of earlier answers
    plain = _after_question(jinja(_talk(jinja), False))
    plain = plain[: found.start()] if (found := ANSWER.search(plain)) else plain
    prompts = [_after_question(jinja(_talk(jinja)[:1], True, **each)) for each in (habits.on, {}, habits.off)]
    for text in (*prompts, plain):
        tag = next((tag for tag in TAG.finditer(text) if not tag[0].startswith("</")), None)
        tokens = list(jinja.control.finditer(rest := text[jinja.common(text, plain) :]))
        if tag:
            after = text[tag.end() :]
            space = after[: len(after) - len(after.lstrip())]
            habits.open, habits.close = tag[0] + space, space + tag[0].replace("<", "</") + 2 * space
        elif len(tokens) > 1:
            habits.open, habits.close = rest[: tokens[-1].start()], rest[tokens[-1].start() :]
        if habits.close:
            break
    else:
        if tagged:
            habits.open, habits.close = "<think>\n", "\n</think>\n\n"
        elif habits.on:
            habits.open, habits.close = _beside_a_call(habits, jinja)
    habits.knows = bool(habits.close)


def _beside_a_call(habits: Habits, jinja: Renderer) -> tuple[str, str]:
    """What stands around a thought where a template shows it in no answer but one that calls a tool, as Gemma 4's."""
    plain, talk = jinja(_talk(jinja), False, **habits.on), _talk(jinja, "key")
    talk[1]["tool_calls"] = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    try:
        text = jinja(talk, False, **habits.on)
    except TemplateError:
        return "", ""
    before, _, behind = text.partition(THOUGHT)
    closing = habits.control.search(behind := behind.partition(THOUGHT_END)[2])
    return (before[jinja.common(plain, before) :], behind[: closing.end()]) if closing else ("", "")


def _opening(habits: Habits, jinja: Renderer) -> str:
    """What stands between a prompt and a thought."""
    text = jinja(_talk(jinja, habits.style), False, **habits.on) if habits.style else ""
    if THOUGHT not in text:
        return habits.open.strip()
    head = text[: text.index(THOUGHT)]
    return head[jinja.common(jinja(_talk(jinja)[:1], True, **habits.on), head) :].strip()


def _state(habits: Habits, jinja: Renderer, switches: dict[str, Any]) -> str:
    """Where in a thought a prompt leaves off."""
    prompt, closing = jinja(_talk(jinja)[:1], True, **switches), habits.closing()
    text = jinja(_talk(jinja, habits.style), False, **switches) if habits.style else ""
    if THOUGHT in text:
        head = text[: text.index(THOUGHT)]
        if prompt.startswith(head.rstrip()):
            return "closed" if closing in prompt[len(head.rstrip()) :] else "opened"
        return "closed" if habits.close.strip() in _after_question(prompt) else "free"
    behind = _after_question(prompt)
    opened, closed = behind.rfind(habits._first(habits.open) or "\0"), behind.rfind(closing)
    return "free" if opened == closed == -1 else "opened" if opened > closed else "closed"


def learn_appending(
    jinja: Renderer, habits: Habits, system: bool, thinking: bool | None, space: str = ""
) -> str | None:
    """What stands between prompts and the words of their answers, which begin with that whitespace, `space`; None if
    the template does more than append, or writes the last answer otherwise than earlier ones.

    Learnt from the renderings of a growing conversation: each of its prompts must be how the whole begins.
    """
    roles = ["system"] * system + ["user", "assistant"] * 3
    turns = [{"role": role, "content": space * (role == "assistant") + f"{role}."} for role in roles]
    hidden, switches = jinja.hide(turns).messages, habits.switches(thinking)
    full = jinja(hidden, False, **switches)
    prompts = [jinja(hidden[:end], True, **switches) for end in range(system + 1, len(turns), 2)]
    answers = list(ANSWER.finditer(full))
    if len(answers) != 3 or not all(map(full.startswith, prompts)):
        return None
    first, second, third = (full[len(prompt) : answer.start()] for prompt, answer in zip(prompts, answers, strict=True))
    ended = all(full.startswith(habits.ending.rstrip(), answer.end()) for answer in answers[:2])
    alone = jinja(hidden[: system + 2], False, **switches)
    after = ANSWER.search(alone)
    behind = alone[after.end() :] if after else ""
    ended &= after is not None and (behind.startswith(habits.ending.rstrip()) or not behind.strip())
    if first[:1].isspace() and prompts[0][-1:].isspace() and not space:
        return None  # whitespace that the publisher encodes as one: no row of several answers has it like the prompts
    unclosed = habits.knows and habits.states[thinking] == "opened" and habits.closing() not in first
    return first if first == second == third and ended and not unclosed else None
