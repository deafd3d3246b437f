"""A chat model without torch, for tests of the layers above it and for notebooks run under nbval."""

import time


class FakeModel:
    """Answers "N: QUESTION", N being the number of the turn. A character is a token."""

    def __init__(self, context=None, name="fake", delay=0.0):
        self.name, self.context, self.delay = name, context, delay
        self.asked = []  # the messages and options of every call
        self.failure = None  # raised after three tokens, once
        self.forgotten = 0

    def count(self, messages):
        return sum(len(message["content"]) for message in messages)

    def forget(self):
        self.forgotten += 1

    def stream(self, messages, stats, **options):
        self.asked.append((messages, options))
        stats.tokens_in, stats.tokens_out = self.count(messages), 0
        turn = sum(message["role"] == "user" for message in messages)
        for character in self.reply(turn, messages[-1]["content"]):
            if self.failure and stats.tokens_out == 3:
                failure, self.failure = self.failure, None
                raise failure
            if stats.tokens_out == options["max_new_tokens"]:
                stats.stop_reason = "length"
                return
            time.sleep(self.delay)
            stats.tokens_out += 1
            yield character

    def reply(self, turn, question):
        return f"{turn}: {question}"
