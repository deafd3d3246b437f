"""The value under a key of a row: nothing, a text, a list, or whether an answer is trained."""

import json
from typing import Any

from .keys import decides
from .rows import DataError

OFF, ON = (False, "0", "0.0", "false", "no"), (True, "1", "1.0", "true", "yes")  # 0 == False
LABELLED_BAD = (*OFF, -1, *"-1 bad rejected undesirable unsafe wrong incorrect 差 坏 错 错误".split())
_TEXT_PARTS = ("text", "input_text", "output_text")


def is_nothing(value: object) -> bool:
    """None, or NaN, as tables have where a cell is empty."""
    return value is None or value != value


def is_empty(value: object) -> bool:
    """Nothing, or a text or a list without anything in it."""
    return is_nothing(value) or value in ([], {}, False) or isinstance(value, str) and value.strip() in ("", "[]", "{}")


def is_one_of(value: object, values: tuple[object, ...]) -> bool:
    """Whether it is one of these, a text in whatever case."""
    return (value.strip().lower() if isinstance(value, str) else value) in values


def is_trained(key: str, value: object) -> bool:
    """Whether an answer that is marked so is trained. Raises DataError for a mark that says neither."""
    if is_one_of(value, OFF) or is_one_of(value, ON):
        return is_one_of(value, OFF if decides(key) == "mask" else ON)
    raise DataError(f"an answer has {key}: {value!r}; an answer is trained (1) or not (0), nothing between.")


def text_of(value: Any, name: str | None) -> str:
    """A text, or the text that parts of type text are; nothing is an empty one. Raises DataError for anything else,
    which messages call `name`."""
    if isinstance(value, str):
        return value
    if is_nothing(value):
        return ""
    if isinstance(value, dict) and "parts" in value and not value.keys() - {"parts", "role"}:
        value = value["parts"]  # Gemini's
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        texts = [part.get("text", part.get("value")) for part in value]
        for part, text in zip(value, texts):
            if not isinstance(text, str) or part.get("type", "text") not in _TEXT_PARTS:
                raise DataError(f"{name} has a part of type {part.get('type')!r}; only texts can be trained here.")
        return "".join(texts)
    raise DataError(f"{name} has content of type {type(value).__name__}; expected a string.")


def unpacked(key: str, value: Any) -> list[Any]:
    """A list, also one that is written as JSON in a cell of a table. Raises DataError for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(
                f"{key!r} is a text that is no JSON: {value[:40]!r}. Write the cell with json.dumps."
            ) from None
    if not isinstance(value, list):
        raise DataError(f"{key!r} is of type {type(value).__name__}; expected a list of messages.")
    return value
