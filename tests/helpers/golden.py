"""What the publishers' own code says, as text: tests/golden, whose README tells where each file is from."""

import json
from functools import cache
from pathlib import Path


@cache
def golden(name: str) -> dict:
    return json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text("utf-8"))
