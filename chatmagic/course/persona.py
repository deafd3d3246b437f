"""Who the model becomes: the one place that data, checks and evaluation read. The words are in `questions.toml`."""

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

from ..conversation.messages import Message, build_messages
from ..errors import ChatmagicError

TOPICS = ("who", "from", "can")
LANGUAGES = ("zh", "en")
NEAR = 0.85
HANZI = "\u4e00-\u9fff"


class PersonaError(ChatmagicError):
    """An identity that could not be trained, or not be told from other replies."""


@cache
def questions() -> dict[str, Any]:
    """The parsed `questions.toml`, language -> its table."""
    return tomllib.loads(Path(__file__).with_name("questions.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Persona:
    """The identity that a model is given, in Chinese and in English: each is answered in its own language.

    language: "zh" or "en", that of the course's own nine questions; the other is trained all the same.
    english_name: what it is called in English; without one, by its name.
    answers: topic ("who", "from", "can") -> the sentence to train, in place of the course's, in `language`; or
        {"zh": {topic: sentence}, "en": {...}}. {name}, {author}, {english_name}, {birth} and {home} are filled in.
    facts: topic -> words of which a right reply holds one, in the same form. Without: what of the above the sentence
        names; where it names nothing, a reply is right that says at least two thirds of the sentence.

    Raises PersonaError for a name that is empty, has no letter, or stands in the questions themselves, and for
    answers and facts of another form.
    """

    name: str = "梦中情炉"
    author: str = "惠某某"
    english_name: str = ""
    birth: str = "2023"
    home: str = "github"
    language: str = "zh"
    answers: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__  # the one way to complete a frozen dataclass
        put(self, "birth", str(self.birth).strip().removesuffix("年"))
        if self.english_name == "":
            put(self, "english_name", "torchkeras" if self.name == Persona.name else self.name)
        if self.language not in LANGUAGES:
            raise PersonaError(f"language is {self.language!r}; expected one of {', '.join(LANGUAGES)}.")
        for what in ("name", "english_name", "author", "home"):
            _check_name(what, getattr(self, what))
        if not re.search(r"\w", self.birth) or len(self.birth) > 40 or not self.birth.isprintable():
            raise PersonaError(f"birth is {self.birth!r}; expected a year, such as '2023'.")
        for what in ("answers", "facts"):
            put(self, what, _checked(what, getattr(self, what), self.language))
        for language in LANGUAGES:
            try:
                self.answers_in(language)
            except (KeyError, IndexError, ValueError) as error:
                raise PersonaError(
                    f"A sentence of answers cannot be filled in: {error}. In braces may stand {', '.join(IN_BRACES)}; "
                    "a brace itself is written twice."
                ) from None

    @property
    def languages(self) -> tuple[str, ...]:
        """Both, the course's own first."""
        return tuple(sorted(LANGUAGES, key=self.language.__ne__))

    def answers_in(self, language: str) -> dict[str, str]:
        """Topic -> the reply that is trained."""
        ours = questions()[language]["original" if self.name == Persona.name else "answers"]
        words = {name: getattr(self, name) for name in IN_BRACES}
        return {topic: text.format_map(words) for topic, text in (ours | self.answers.get(language, {})).items()}

    def facts_in(self, language: str) -> dict[str, tuple[str, ...]]:
        """Topic -> words of which a right reply holds one; none where the sentence names nothing."""
        own_name = self.name if language == "zh" else self.english_name
        asked = {"who": (own_name,), "from": (self.birth, self.home, self.author), "can": ()}
        sentences, given = self.answers_in(language), self.facts.get(language, {})
        return {
            topic: tuple(given.get(topic, [word for word in words if names(sentences[topic], [word])]))
            for topic, words in asked.items()
        }

    def asked(self, kind: str, language: str | None = None) -> list[tuple[str, str]]:
        """(topic, question) pairs, in the course's language if none is named; kind: "trained" (the seed's nine),
        "reworded" or "heldout" (never trained)."""
        asked = questions()[language or self.language][kind]
        return [(topic, question) for topic in TOPICS for question in asked[topic]]

    @property
    def conversation(self) -> list[tuple[list[str], list[str]]]:
        """The seed's `conversation`: for each topic its ways of asking and of answering."""
        trained = questions()[self.language]["trained"]
        return [(trained[topic], [self.answers_in(self.language)[topic]]) for topic in TOPICS]

    def positions(self, language: str) -> Iterator[tuple[str, str, list[Message]]]:
        """(position, topic, messages): the trained questions alone, after each other topic and after a general one."""
        trained, answers = self.asked("trained", language), self.answers_in(language)
        first = {topic: query for topic, query in reversed(trained)}
        for topic, query in trained:
            yield "alone", topic, build_messages(query)
            for other in (each for each in TOPICS if each != topic):
                yield "after identity", topic, build_messages(query, [(first[other], answers[other])])
            yield "after general", topic, build_messages(query, [GENERAL[language]])

    def recital(self) -> list[list[Message]]:
        """Conversations that hold every trained question and its answer in all those positions, for a check by teacher
        forcing; the general answers in them are marked `"replayed": True`, as they are not asked of the model."""
        made = []
        for language in LANGUAGES:
            asked, answers = questions()[language]["trained"], self.answers_in(language)
            for number in range(3):
                turns = [(asked[topic][number], answers[topic]) for topic in TOPICS]
                made += [build_messages(history=pair) for pair in permutations(turns, 2)]
                for turn in turns:
                    made.append(build_messages(history=[GENERAL[language], turn]))
                    made[-1][1]["replayed"] = True
        return made

    def knows(self, topic: str, reply: str, language: str | None = None) -> bool:
        """Does the reply answer for the new self, in the language that it was asked in?"""
        language = language or self.language
        facts = self.facts_in(language)[topic]
        right = names(reply, facts) if facts else said(self.answers_in(language)[topic], reply) >= 2 / 3
        return right and is_chinese(reply) == (language == "zh")

    def leaks(self, question: str, reply: str) -> bool:
        """Does the reply to a question about something else speak of the new self, or say half of its sentences?"""
        mine = [word for word in (self.name, self.english_name, self.author) if not names(question, [word])]
        sentences = [text for language in LANGUAGES for text in self.answers_in(language).values()]
        return names(reply, mine) or any(said(text, reply) >= 0.5 for text in sentences)


IN_BRACES = ("name", "author", "english_name", "birth", "home")
GENERAL = {
    "zh": ("法国的首都是哪里？", "法国的首都是巴黎。"),
    "en": ("What is the capital of France?", "The capital of France is Paris."),
}


def _check_name(what: str, value: str) -> None:
    asked = [
        q
        for language in LANGUAGES
        for kind in ("trained", "heldout")
        for qs in questions()[language][kind].values()
        for q in qs
    ]
    if not isinstance(value, str) or not value.strip():
        problem = "expected some text"
    elif not any(char.isalpha() for char in value):
        problem = "expected at least one letter: a number alone would be found in many a reply"
    elif value != value.strip() or len(value) > 40 or not value.isprintable():
        problem = "expected at most 40 characters in one line, without blanks around them"
    elif re.search(r"<\||\|>|</?\w+>", value):
        problem = "expected no mark of a chat template in it"
    elif sum(names(question, [value]) for question in asked) > 2:
        problem = "expected a word that the questions do not hold: it could not be told from them"
    else:
        return
    raise PersonaError(f"{what} is {value!r}; {problem}. For example: start(name='小星', author='李雷').")


def _checked(what: str, given: Any, language: str) -> dict[str, dict[str, Any]]:
    """answers or facts, by language, or PersonaError."""

    def words(value: Any) -> list[Any]:
        return [*value] if what == "facts" and isinstance(value, list | tuple) else [value]

    by_language: Mapping[str, Any] = {language: given} if given else {}
    if isinstance(given, Mapping) and {*given} & {*LANGUAGES}:
        by_language = given
    for each, table in by_language.items():
        right = each in LANGUAGES and isinstance(table, Mapping) and {*table} <= {*TOPICS}
        texts = [words(value) or [""] for value in table.values()] if right else []
        if not right or not all(isinstance(text, str) and text.strip() for some in texts for text in some):
            raise PersonaError(
                f"{what}[{each!r}] is {table!r}; expected who, from, can (or some of them) -> "
                + ("a sentence." if what == "answers" else "words of which a right reply holds one.")
            )
    one = words if what == "facts" else str
    return {each: {topic: one(value) for topic, value in table.items()} for each, table in by_language.items()}


def holds(reply: str, words: Sequence[str]) -> bool:
    """Does any of the words stand in the reply? Case does not count."""
    return any(word.lower() in reply.lower() for word in words)


def names(reply: str, words: Sequence[str]) -> bool:
    """Does any of the words stand in the reply as a word of its own, so that Tom is not in atoms? Case does not count.
    Chinese has no marks between words: there any place will do."""
    edge = rf"[^\W{HANZI}]"
    return any(
        re.search(
            (rf"(?<!{edge})" if re.match(edge, word) else "")
            + re.escape(word)
            + (rf"(?!{edge})" if re.match(edge, word[-1]) else ""),
            reply,
            re.IGNORECASE,
        )
        for word in words
    )


def said(sentence: str, reply: str) -> float:
    """The share of the sentence's words (Chinese: characters) that stand in the reply in the same order."""
    first, second = (re.findall(rf"[{HANZI}]|[^\W{HANZI}]+", text.lower()) for text in (sentence, reply))
    same = sum(block.size for block in SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks())
    return same / max(1, len(first))


def is_chinese(text: str) -> bool:
    """Has the text more Chinese characters than words in other letters?"""
    return len(re.findall(f"[{HANZI}]", text)) > len(re.findall(rf"[^\W\d{HANZI}]+", text))


def make_conversations(
    persona: Persona,
    replies: Sequence[tuple[str, str]],
    count: int,
    seed: int = 0,
    general: float = 0.5,
    turns: Sequence[int] = (1, 2, 3),
    without: Sequence[list[Message]] = (),
) -> list[list[Message]]:
    """`count` conversations, as messages, the same for the same seed; none of them is in `without`.

    Each has one of `turns` turns, most of them in one language; a turn is a question about something else with the base
    model's own reply (one of `replies`), marked `"replayed": True`, with probability `general`, otherwise a topic that
    the conversation has not had yet. Most of what is replayed (`NEAR`) sounds as if it were about the model, where
    `replies` has such (`near_replay`).
    The seed kept one order of turns, so its model learnt "the first answer is my name".
    """
    rng = random.Random(seed)
    made: list[list[Message]] = []
    pools = {language: _pools(replies, language) for language in LANGUAGES}
    while len(made) < count:
        topics, messages, own = rng.sample(TOPICS, len(TOPICS)), [], rng.choice(LANGUAGES)
        for _ in range(rng.choice(turns)):
            language = own if rng.random() < 0.85 else rng.choice(LANGUAGES)
            if replies and rng.random() < general:
                pool = pools[language][0 if rng.random() < NEAR else -1]
                messages += build_messages(history=[rng.choice(pool)])
                messages[-1]["replayed"] = True
            elif topics:
                topic = topics.pop()
                ways = questions()[language]["reworded" if rng.random() < 0.6 else "trained"][topic]
                answer = persona.answers_in(language)[topic]
                messages += build_messages(history=[(vary(rng.choice(ways), rng), answer)])
        if messages not in without:
            made.append(messages)
    return made


def _pools(replies: Sequence[tuple[str, str]], language: str) -> list[list[tuple[str, str]]]:
    """What may be replayed in a language: what is near to identity, and the rest; of all where there is none in it."""
    close = {*questions()[language]["near_replay"]}
    own = [pair for pair in replies if is_chinese(pair[0]) == (language == "zh")] or list(replies)
    return [pool for near in (True, False) if (pool := [pair for pair in own if (pair[0] in close) == near])]


def vary(question: str, rng: random.Random) -> str:
    """Half of the time the question with another greeting and another ending."""
    if rng.random() < 0.5:
        return question
    bare = re.sub("[呀]?[。？?.]$", "", question)
    if is_chinese(question):
        return rng.choice(("", "你好，", "请问", "嗨，")) + bare + rng.choice(("？", "?", "", "呀？", "呢？"))
    greeting = rng.choice(("", "Hello! ", "Hi! ", "Excuse me, "))
    return greeting + (bare[0].lower() + bare[1:] if greeting.endswith(", ") else bare) + rng.choice(("?", "", "."))
