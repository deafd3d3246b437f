"""A tokenizer's own chat template (Jinja): the prompts it writes, and the rows that train what follows them.

transformers can find trained spans (`return_assistant_tokens_mask`) only where a template marks them with `{%
generation %}`, which few do, and not together with `sanitize_control_tokens`, which encodes a control token in a
message apart from its neighbours. Here they are found by comparing renderings: of the prompt that asks for an answer,
and of the conversation that ends with it.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..conversation.messages import Message
from ..conversation.pieces import Parting
from .habits import KEY, Habits, learn_appending, learn_habits, split_thoughts
from .jinja import ANSWER, BEGIN, CLOSING, MARKS, PRIVATE, QUESTION, THOUGHT, THOUGHT_END, Hidden, Renderer, spans_of
from .templates import (
    EndOfTurn,
    NoSystemError,
    Span,
    Template,
    TemplateError,
    control_tokens,
    is_greeting,
    no_greeting,
    no_system,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NO_THOUGHT = THOUGHT + THOUGHT_END
_PRIVATE, _TELLS = re.compile(PRIVATE), re.compile(r"/(no_)?think\b")


class Said(NamedTuple):
    """One answer as a template writes it where it is the last, in hidden text: the prompt that asks for it, what the
    model says before its words, the words, how they are ended (None: not at all), and what the template has then."""

    prompt: str
    lead: str
    words: str
    end: str | None
    behind: str


class Earlier(NamedTuple):
    """What a template makes of answers that are not the last any more, each thought in it as NO_THOUGHT.

    between  what stands between the prompt for an answer, as far as it is kept, and the words
    instead  what that prompt ends with in its place
    asks     what every prompt ends with, behind its question
    lead, end, behind  as `Said` has them where the answer is the last
    """

    between: str
    instead: str
    asks: str
    lead: str
    end: str | None
    behind: str

    def recall(self, hidden: Hidden, turns: Sequence[int], taught: Sequence[int], text: str) -> list[Said] | None:
        """What is said in the turns of `taught`, of a `text` in which all answers, `turns`, are earlier ones."""
        answers = list(ANSWER.finditer(text))
        if len(answers) != len(turns) or text.rpartition(QUESTION)[2] != self.asks:
            return None
        found = []
        for turn, answer in zip(turns, answers, strict=True):
            content, thought = hidden.messages[turn]["content"], hidden.thoughts[turn] or ""
            before = self.between.replace(NO_THOUGHT, thought)
            spaced = content.partition(BEGIN)[0].removesuffix(THOUGHT_END + CLOSING)[-1:].isspace()
            if spaced or not content.endswith(answer[0]) or not text.endswith(before, 0, answer.start()):
                return None
            if turn in taught:
                prompt = text[: answer.start() - len(before)] + self.instead
                found.append(Said(prompt, self.lead.replace(NO_THOUGHT, thought), answer[1], self.end, self.behind))
        return found


class OwnTemplate:
    """The format that a tokenizer carries in `chat_template`; the interface is that of `Template`."""

    name = "chat_template"
    takes_system = True
    bos = end = ""
    piecewise = False
    stop_strings = ()

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._jinja = Renderer(tokenizer)
        self._joints: dict[tuple[bool, bool | None, str], str | None] = {}
        self._earlier: dict[tuple[bool | None, ...], Earlier | None] = {}

    @cached_property
    def habits(self) -> Habits:
        """What the template does with thoughts and endings."""
        return learn_habits(self._jinja)

    @cached_property
    def _end(self) -> re.Pattern[str]:
        """The ending, with the whitespace that an answer's words leave before it, and that its token swallows."""
        ending = self.habits.ending
        return re.compile(rf"\s*{re.escape(ending.strip())}" + r"\s*" * (ending != ending.rstrip()))

    def control_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
        """The tokens that no message may write, with their ids."""
        return control_tokens(tokenizer, tokenizer.get_chat_template())

    def stop_token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """The ids that end a generation, first the one that training teaches: what can follow an answer's words."""
        control, eos = self.control_tokens(tokenizer), tokenizer.eos_token_id
        stops = [control.get(token) for token in self.habits.stops]
        ids = [*stops, eos] if self.habits.ending else [eos, *stops]
        return [token for token in dict.fromkeys(ids) if token is not None]

    @property
    def knows_thoughts(self) -> bool:
        """Whether the template has a place for what a model thinks before it answers."""
        return self.habits.knows

    def thinking_for(self, messages: Sequence[Message]) -> bool | None:
        """How a conversation is trained where nobody says: thinking if it holds a thought, else not; None where the
        template cannot be told."""
        if not self.habits.off:
            return None
        return any(KEY in message for message in split_thoughts(messages))

    def parting(self, thinking: bool | None) -> Parting | None:
        """As `Template.parting`: its marks are those of the template."""
        habits = self.habits
        if not habits.knows:
            return None
        closing = habits.closing()
        lead = habits.close.partition(closing)[2].strip()
        openings = tuple(filter(None, dict.fromkeys([habits.opening, "<think>"])))
        return Parting(openings, closing, lead, habits.states[thinking] == "opened", habits.close)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, thinking: bool | None = None
    ) -> list[Span]:
        """As `Template.render`. Raises TemplateError for a system text without a place, and where the template cannot
        be told to think or not."""
        hidden = self._hide(messages)
        switches = self.habits.switches(thinking) if thinking is not None else {}
        text = self._text(hidden.messages, add_generation_prompt and messages[-1]["role"] == "user", switches)
        return self._prompt(text, hidden, thinking)

    def render_rows(
        self, messages: Sequence[Message], multi_rounds: bool = True, thinking: bool | None = None
    ) -> list[list[Span]]:
        """As `Template.render_rows`: one row where the template only appends, else one for each answer.

        What stands before an answer is the prompt that asks for it. Raises TemplateError where what the template
        writes of an answer cannot follow that prompt.
        """
        hidden, switches = self._hide(messages), self.habits.switches(thinking)
        if is_greeting(messages, start := messages[0]["role"] == "system"):
            self._check_greeting(hidden, start, switches)
        last = len(messages) - 1
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        taught = [turn for turn in turns if (multi_rounds or turn == last) and messages[turn].get("weight", 1)]
        if not any(hidden.thoughts) and self._joint(messages[0]["role"] == "system", thinking) is not None:
            text = self._text(hidden.messages, messages[-1]["role"] == "user", switches)
            if row := self._cut(text, hidden, thinking, taught):
                return [row]
        said = self._recall(hidden, taught, thinking, switches) if taught else []
        said = said or [self._say(hidden, turn, thinking, switches) for turn in taught]
        return [self._row(hidden, turn, each, thinking) for turn, each in zip(taught, said, strict=True)]

    def _check_greeting(self, hidden: Hidden, start: int, switches: dict[str, Any]) -> None:
        """Raise TemplateError where the template leaves a greeting out, or refuses it."""
        try:
            text = self._text(hidden.messages[: start + 2], True, switches)
        except NoSystemError:
            raise
        except TemplateError as error:
            raise no_greeting("this chat template") from error
        if hidden.messages[start]["content"].strip() not in text:
            raise no_greeting("this chat template")

    def writes_like(self, template: Template) -> bool:
        """Whether the two write the same prompts, judged by one with and one without a system text."""
        turns = [{"role": role, "content": f" {role}\n"} for role in ("system", "user", "assistant", "user")]
        try:
            own = [self._jinja(self._jinja.hide(probe).messages, True) for probe in (turns, turns[1:])]
        except TemplateError:
            return False
        own = ["".join(span.text for span in spans_of(text, MARKS)) for text in own]
        other = ["".join(span.text for span in template.render(probe)) for probe in (turns, turns[1:])]
        return own == [(template.bos or "") + prompt for prompt in other]

    def _hide(self, messages: Sequence[Message]) -> Hidden:
        """The messages for the template, a thought where it looks for one. Most hold none, and learning takes time."""
        parted = split_thoughts(messages)
        if not any(KEY in message for message in parted):
            return self._jinja.hide(messages)
        knows = self.habits.knows
        return self._jinja.hide(parted if knows else split_thoughts(messages, tagged=False), self.habits.style)

    def _joint(self, system: bool, thinking: bool | None, space: str = "") -> str | None:
        """What `learn_appending` learns; whitespace before an answer matters only where one without it is appended."""
        key = system, thinking, space
        if key not in self._joints:
            try:
                learnt = None
                if not space or self._joint(system, thinking) is not None:
                    learnt = learn_appending(self._jinja, self.habits, *key)
            except TemplateError:
                learnt = None
            self._joints[key] = learnt
        return self._joints[key]

    def _text(self, hidden: Sequence[Message], add_generation_prompt: bool, switches: dict[str, Any]) -> str:
        """The rendering, the system text in it."""
        system = hidden[0]["content"].strip() if hidden[0]["role"] == "system" else ""
        try:
            text = self._jinja(hidden, add_generation_prompt, **switches)
        except TemplateError as error:
            if system:
                self._jinja(hidden[1:], add_generation_prompt, **switches)  # raises if it is not for the system text
                raise no_system("this chat template", str(error)) from error
            raise
        if system not in text:
            raise no_system("this chat template")
        return text

    def _prompt(self, text: str, hidden: Hidden, thinking: bool | None) -> list[Span]:
        """A prompt, cut as the rows are whose beginning it is."""
        return self._cut(text, hidden, thinking, ()) or spans_of(text, hidden.shown)

    def _cut(self, text: str, hidden: Hidden, thinking: bool | None, taught: Sequence[int]) -> list[Span] | None:
        """A conversation cut where its prompts leave off, the answers in `taught` trained; None if the template does
        more than append, or did not write these answers as learnt."""
        messages, shown = hidden.messages, hidden.shown
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or any(hidden.thoughts):
            return None
        answers = list(ANSWER.finditer(text))
        if len(answers) != len(turns):
            return None
        spans, start, system = [], 0, messages[0]["role"] == "system"
        for index, answer in zip(turns, answers, strict=True):
            between = self._joint(system, thinking, messages[index]["content"].partition(BEGIN)[0])
            if between is None or not text.endswith(between, start, answer.start()):
                return None
            cut = answer.start() - len(between)
            marks = True, index in taught, messages[index].get("replayed", False)
            end = self._ending(text, answer.end())
            spans += spans_of(text[start:cut], shown)
            spans += [*spans_of(text[cut : answer.start()], shown, *marks), *self._words(answer[1], shown, end, marks)]
            start = answer.end() + len(end or "")
        return spans + spans_of(text[start:], shown)

    def _say(self, hidden: Hidden, turn: int, thinking: bool | None, switches: dict[str, Any]) -> Said:
        """One answer as the template writes it where it is the last."""
        messages = hidden.messages[: turn + 1]
        prompt = self._text(messages[:-1], True, switches)
        full = self._jinja(messages, False, **switches)
        answer = next(ANSWER.finditer(full, full.rfind(BEGIN)), None) if BEGIN in full else None
        if not answer or answer[0] not in messages[-1]["content"]:
            raise TemplateError(
                f"Message {turn} (assistant) cannot be trained: this chat template does not write its words as they "
                "are. Change them, or pass another model_type."
            )
        text, asked = full[: answer.start()], prompt
        if not self._follows(prompt, text):
            asked, text = self._behind_question(messages, switches)
        lead = self._lead(turn, asked, text, hidden.thoughts[turn], thinking)
        end = self._ending(full, answer.end())
        return Said(prompt, lead, answer[1], end, full[answer.end() + len(end) :] if end else "")

    def _recall(
        self, hidden: Hidden, taught: Sequence[int], thinking: bool | None, switches: dict[str, Any]
    ) -> list[Said] | None:
        """What `_say` gives of each turn in `taught`, out of one rendering; None where that is not written as learnt,
        or where some answers have a thought and others none, or a question may tell the template to think or not."""
        messages = hidden.messages[: taught[-1] + 1]
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        asked = (message["content"] for message in messages if message["role"] != "assistant")
        key = messages[0]["role"] == "system", thinking, *{bool(hidden.thoughts[turn]) for turn in turns}
        if len(key) > 3 or any(map(_TELLS.search, asked)):
            return None
        try:
            if key not in self._earlier:
                self._earlier[key] = None
                self._earlier[key] = self._learn_earlier(*key)
            learnt = self._earlier[key]
            return learnt and learnt.recall(hidden, turns, taught, self._asked_on(messages, switches))
        except TemplateError:
            return None

    def _learn_earlier(self, system: bool, thinking: bool | None, thoughts: bool) -> Earlier | None:
        """Learnt from a conversation of three rounds, of which what is recalled must be what is said."""
        turns = [{"role": role, "content": f"{role}."} for role in ["system"] * system + ["user", "assistant"] * 3]
        taught = range(system + 1, len(turns), 2)
        for turn in taught if thoughts else ():
            turns[turn][KEY] = f"thought {turn}."
        hidden, switches = self._jinja.hide(turns, self.habits.style), self.habits.switches(thinking)
        said = [self._say(hidden, turn, thinking, switches) for turn in taught]
        text, thought = self._asked_on(hidden.messages, switches), hidden.thoughts[taught[0]] or NO_THOUGHT
        prompt, lead, _, end, behind = said[0]
        common, answer = self._jinja.common(prompt, text), ANSWER.search(text)
        if not answer:
            return None
        between, lead = (part.replace(thought, NO_THOUGHT) for part in (text[common : answer.start()], lead))
        learnt = Earlier(between, prompt[common:], text.rpartition(QUESTION)[2], lead, end, behind)
        return learnt if learnt.recall(hidden, taught, taught, text) == said else None

    def _asked_on(self, messages: Sequence[Message], switches: dict[str, Any]) -> str:
        """The prompt with one more question, for which every answer is an earlier one."""
        return self._text([*messages, {"role": "user", "content": QUESTION}], True, switches)

    def _row(self, hidden: Hidden, turn: int, said: Said, thinking: bool | None) -> list[Span]:
        """The prompt of one answer, and what the model has to say then: its thought, its words and their ending."""
        shown, marks = hidden.shown, (True, True, hidden.messages[turn].get("replayed", False))
        before = self._prompt(said.prompt, Hidden(hidden.messages[:turn], hidden.thoughts[:turn], shown), thinking)
        words = self._words(said.words, shown, said.end, marks)
        return [*before, *spans_of(said.lead, shown, *marks), *words, *spans_of(said.behind, shown)]

    def _follows(self, prompt: str, text: str) -> bool:
        """Whether what differs of the two is at most a thought that the prompt begins, or whitespace."""
        rest = prompt[self._jinja.common(prompt, text) :]
        return not rest.strip() or rest in self.habits.begun or rest.strip() == self.habits.open.strip()

    def _behind_question(self, messages: Sequence[Message], switches: dict[str, Any]) -> tuple[str, str]:
        """What a prompt, and what the conversation with its answer has behind the last question: all that can be
        compared where a template writes questions that are answered in another way."""
        question = {"role": "user", "content": QUESTION}
        asked = self._jinja([*messages[:-2], question], True, **switches)
        answered = self._jinja([*messages[:-2], question, messages[-1]], False, **switches)
        return asked.rpartition(QUESTION)[2], answered.rpartition(BEGIN)[0].rpartition(QUESTION)[2]

    def _lead(self, turn: int, prompt: str, text: str, thought: str | None, thinking: bool | None) -> str:
        """What the model says before the words; `text` is what the template writes before them."""
        habits, state = self.habits, self.habits.states[thinking]
        common = self._jinja.common(prompt, text)
        rest, written = prompt[common:], text[common:]
        if thought and (not habits.knows or state == "closed"):
            raise TemplateError(
                f"Message {turn} (assistant) has a thought, and "
                + ("this chat template knows none." if not habits.knows else "its prompt leaves no room for one.")
                + " Take it out"
                + (", or pass thinking=True." if habits.on else ".")
            )
        if thought and THOUGHT in written:
            return written[written.index(THOUGHT) :] if rest else written
        closes = bool(habits.close) and habits.closing() in written
        if thought:
            behind = written.partition(habits.closing())[2] if closes else "" if not rest else written
            return ("" if state == "opened" else habits.open) + thought + habits.close + behind.lstrip()
        if state == "opened" and not closes:
            return habits.close + (written if not rest else "")
        if not rest or state == "opened":
            return written
        if state == "closed":
            return written.partition(habits.closing())[2].lstrip() if closes else written
        if not rest.strip():
            return written.lstrip()
        if not written.strip() or "".join(written.split()) == "".join(rest.split()):
            return ""  # the history lacks what the prompt begins, or has it with other whitespace
        raise TemplateError(
            f"Message {turn} (assistant) cannot be trained: the prompt which asks for it ends with {rest!r}, and the "
            "answer that this chat template writes does not follow that. Pass another model_type."
        )

    def _ending(self, full: str, position: int) -> str | None:
        """How the answer whose words end at `position` is ended there, whitespace included; None if it is not."""
        if not self.habits.ending:
            return ""
        match = self._end.match(full, position)
        return match and match[0]

    def _words(self, hidden: str, shown: dict[str, str], end: str | None, marks: tuple[bool, ...]) -> list[Span]:
        """The words of an answer and their ending, which is added where the template leaves out the last one's."""
        words = _PRIVATE.sub(lambda match: shown[match[0]], hidden)
        ending = self.habits.ending
        last = Span(ending if end is None else end, True, *marks) if ending else EndOfTurn("", True, *marks)
        return [Span(words, False, *marks), last]
