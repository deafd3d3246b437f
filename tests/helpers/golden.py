"""What the publishers' own code says, as text: tests/golden, whose README tells where each file is from."""

import json
import os
from functools import cache
from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"
# Checkpoints that are ours from top to bottom; where the golden data lie, also with the publishers' tokenizers.
KINDS = ["tiny", "golden"] if SHARED.is_dir() or os.environ.get("CHATMAGIC_REQUIRE_SHARED") else ["tiny"]
FAMILIES = ["baichuan2-13b-chat", "chatglm2-6b", "internlm-chat-7b", "qwen-7b-chat"]
PUBLISHED = [f"{kind} {name}" for kind in KINDS for name in FAMILIES]  # what the fixture `family` is of


@cache
def golden(name: str) -> dict:
    return json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text("utf-8"))
