"""Texts to encode twice and compare."""

import random


def texts(tokenizer, count=1000):
    """Texts of words, signs and control tokens, which stand at each other's edges."""
    rng = random.Random(0)
    parts = [
        *"abcXYZ019 \n\t.,!?<>|_'\"/\\-=+*　、。！？",
        "  ",
        *"你好世界梦中情炉",
        "é",
        "ß",
        "😀",
        "한",
        "０１",
        "▁",
        "[INST]",
    ]
    parts += tokenizer.all_special_tokens + ["<eoa>", "<reserved_106>", "<|User|>:"]
    return ["".join(rng.choice(parts) for _ in range(rng.randint(0, 40))) for _ in range(count)]
