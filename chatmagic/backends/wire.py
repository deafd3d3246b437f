"""How servers write replies and errors: OpenAI's protocol in the forms that are found in the world."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

DONE = {"done": True}
"""Stands for the end that a stream itself names."""


_WORDS = "error", "message", "detail", "msg", "error_msg", "status_msg"


_LINES = re.compile(r"\{.*\}\n\{")
"""Of objects that stand a line each, with nothing around them."""


class NoReply(ValueError):
    """A body that is no reply; its text."""


class BrokenEvent(ValueError):
    """An event that ends in its middle."""


def read_events(blocks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects in a body: the events of a stream, or the one that it is itself. Raises NoReply and BrokenEvent."""
    seen, held, failed, events = [], "", False, 0
    for line in read_lines(blocks):
        field, _, value = line.partition(":")
        if field == "data" and value.strip() == "[DONE]":
            yield DONE
            return
        if field == "data":
            held, events = held + value, events + 1
            try:
                event = json.loads(held)
            except ValueError:
                if not failed:
                    continue  # its rest may stand in another such line
                event = {"error": held}
            held = ""
            if isinstance(event, dict):
                yield event
        elif field == "event":
            failed = value.strip() == "error"
        elif held and not line:
            if held.lstrip().startswith("{"):
                raise BrokenEvent(held)
            held = ""  # a ping
        elif not events and line:
            seen.append(line)
    if held:
        raise BrokenEvent(held)
    if not events:
        text = "\n".join(seen)
        try:
            whole = json.loads(text if len(seen) < 2 or not _LINES.match(text) else f"[{','.join(seen)}]")
        except ValueError:
            raise NoReply(text) from None
        for event in whole if isinstance(whole, list) else [whole]:
            if not isinstance(event, dict):
                raise NoReply(text)
            yield event


def read_lines(blocks: Iterable[bytes]) -> Iterator[str]:
    """The lines of a body, cut at newlines alone: JSON may hold U+2028 as it stands."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").strip("\r\ufeff")
    yield rest.decode("utf-8", "replace").strip("\r\ufeff")


def error_in(event: dict[str, Any]) -> Any:
    """The error that stands in the place of a reply, None for a reply."""
    if event.get("error") or event.get("object") == "error":
        return event.get("error") or event
    if isinstance(told := event.get("base_resp"), dict) and told.get("status_code"):  # MiniMax's
        return told
    told = event.keys() & {*_WORDS}
    return event if told and not event.keys() & {"choices", "usage", "done", "id"} else None


def own_words(body: Any) -> str:
    """What an error says, in one line: by `{"error": {"message": ...}}`, FastAPI's `detail`, or the title of a page."""
    if isinstance(body, dict):
        found = next((body[key] for key in (*_WORDS,) if body.get(key)), None)
        words = json.dumps(body, ensure_ascii=False) if found is None else own_words(found)
        return f"{'.'.join(map(str, body['loc']))}: {words}" if isinstance(body.get("loc"), list) else words
    if isinstance(body, list):
        return "; ".join(map(own_words, body))
    title = re.search(r"<title>(.*?)</title>", str(body), re.IGNORECASE | re.DOTALL)
    return " ".join((title[1] if title else str(body)).split())


def choices_in(event: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of an event, which are a list, or one by itself, or none; what is no object is a choice's text."""
    found = event.get("choices") or []
    if isinstance(found, dict):
        found = [found] if found.keys() & {"delta", "message", "text"} else list(found.values())
    found = found if isinstance(found, list) else [found]
    return [choice if isinstance(choice, dict) else {"text": choice} for choice in found if choice]


def thought_and_words(said: Any) -> tuple[str, str]:
    """What one piece of a reply holds: under `reasoning_content`, `reasoning` or `thinking`, and under `content`, text
    or a list of parts."""
    if not isinstance(said, dict):
        return "", text_in(said)
    thoughts = said.get("reasoning_content"), said.get("reasoning"), said.get("thinking")
    thought, words = next(filter(None, map(text_in, thoughts)), ""), ""
    content = said.get("content")
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and re.search("think|reason", str(part.get("type"))):
            thought += text_in(part.get("thinking") or part.get("reasoning") or part)
        else:
            words += text_in(part)
    return thought, words


def text_in(value: Any) -> str:
    """The text that a value is, or has in it."""
    if isinstance(value, list):
        return "".join(map(text_in, value))
    if isinstance(value, dict):
        return next(filter(None, (text_in(value.get(key)) for key in ("text", "value", "content"))), "")
    return "" if value is None or isinstance(value, bool) else str(value)


def number_in(value: Any) -> int | None:
    """The number that a value is; None if it is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
