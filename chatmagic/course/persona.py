"""Who the model becomes: the one place that data, checks and evaluation read. The words are in `questions.toml`."""

import random
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..conversation.messages import Message, build_messages

TOPICS = ("who", "from", "can")


@cache
def questions() -> dict[str, Any]:
    """The parsed `questions.toml`."""
    return tomllib.loads(Path(__file__).with_name("questions.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Persona:
    """The identity that a model is given; all but `language` ("zh" or "en") stands in its answers."""

    name: str = "梦中情炉"
    author: str = "惠某某"
    english_name: str = "torchkeras"
    birth: str = "2023"
    home: str = "github"
    language: str = "zh"

    @property
    def answers(self) -> dict[str, str]:
        """Topic -> the reply that is trained."""
        return {topic: text.format_map(vars(self)) for topic, text in questions()[self.language]["answers"].items()}

    @property
    def facts(self) -> dict[str, tuple[str, ...]]:
        """Topic -> strings of which a right reply holds one."""
        zh = self.language == "zh"
        return {
            "who": (self.name if zh else self.english_name,),
            "from": (self.birth, self.home, self.author),
            "can": ("优雅", "图表") if zh else ("elegant", "chart"),  # not "train": the answer to "who" says it too
        }

    def asked(self, kind: str) -> list[tuple[str, str]]:
        """(topic, question) pairs; kind: "trained" (the seed's nine), "reworded" or "heldout" (never trained)."""
        asked = questions()[self.language][kind]
        return [(topic, question) for topic in TOPICS for question in asked[topic]]

    @property
    def conversation(self) -> list[tuple[list[str], list[str]]]:
        """The seed's `conversation`: for each topic its ways of asking and of answering."""
        trained = questions()[self.language]["trained"]
        return [(trained[topic], [self.answers[topic]]) for topic in TOPICS]

    def knows(self, topic: str, reply: str) -> bool:
        """Does the reply hold the topic's key fact? Case does not count."""
        return holds(reply, self.facts[topic])

    def leaks(self, reply: str) -> bool:
        """Does the reply to a general question speak of the new self?"""
        return holds(reply, (self.name, self.english_name, self.author))


def holds(reply: str, words: Sequence[str]) -> bool:
    """Does any of the words stand in the reply? Case does not count."""
    return any(word.lower() in reply.lower() for word in words)


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

    Each has one of `turns` turns; a turn is a general question with the base model's own reply (one of `replies`),
    marked `"replayed": True`, with probability `general`, otherwise a topic that the conversation has not had yet.
    The seed kept one order of turns, so its model learnt "the first answer is my name".
    """
    rng = random.Random(seed)
    made: list[list[Message]] = []
    reworded = {topic: [q for t, q in persona.asked("reworded") if t == topic] for topic in TOPICS}
    trained = {topic: [q for t, q in persona.asked("trained") if t == topic] for topic in TOPICS}
    # Most of what is replayed is in the persona's own language, or questions in it would all be taken for identity.
    own = [pair for pair in replies if is_chinese(pair[0]) == (persona.language == "zh")]
    other = [pair for pair in replies if pair not in own]
    while len(made) < count:
        topics, messages = rng.sample(TOPICS, len(TOPICS)), []
        for _ in range(rng.choice(turns)):
            if replies and rng.random() < general:
                messages += build_messages(history=[rng.choice((own if rng.random() < 0.6 else other) or replies)])
                messages[-1]["replayed"] = True
            elif topics:
                topic = topics.pop()
                question = rng.choice((reworded if rng.random() < 0.6 else trained)[topic])
                messages += build_messages(history=[(vary(question, rng), persona.answers[topic])])
        if messages not in without:
            made.append(messages)
    return made


def is_chinese(text: str) -> bool:
    """Does the text hold a Chinese character (CJK Unified Ideographs)?"""
    return any("一" <= char <= "鿿" for char in text)


def vary(question: str, rng: random.Random) -> str:
    """Half of the time the question with another greeting and another ending."""
    if rng.random() < 0.5:
        return question
    bare = re.sub("[呀]?[。？?.]$", "", question)
    if is_chinese(question):
        return rng.choice(("", "你好，", "请问", "嗨，")) + bare + rng.choice(("？", "?", "", "呀？", "呢？"))
    greeting = rng.choice(("", "Hello! ", "Hi! ", "Excuse me, "))
    return greeting + (bare[0].lower() + bare[1:] if greeting.endswith(", ") else bare) + rng.choice(("?", "", "."))
