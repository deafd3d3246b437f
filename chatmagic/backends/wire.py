"""How servers write replies and errors: OpenAI's protocol in the forms that are found in the world."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

DONE = {"done": True}
"""Stands for the end that a stream itself names."""


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
            raise BrokenEvent(held)
        elif not events and line:
            seen.append(line)
    if held:
        raise BrokenEvent(held)
    if not events:
        try:
            whole = json.loads("\n".join(seen))
        except ValueError:
            raise NoReply("\n".join(seen)) from None
        for event in whole if isinstance(whole, list) else [whole]:
            if not isinstance(event, dict):
                raise NoReply("\n".join(seen))
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
    told = {"detail", "message", "msg", "error_msg"} & event.keys()
    return event if told and not event.keys() & {"choices", "usage", "done", "id"} else None


def own_words(body: Any) -> str:
    """What an error says, in one line: by `{"error": {"message": ...}}`, FastAPI's `detail`, or the title of a page."""
    if isinstance(body, dict):
        found = next((body[key] for key in ("error", "message", "detail", "msg", "error_msg") if body.get(key)), None)
        words = json.dumps(body, ensure_ascii=False) if found is None else own_words(found)
        return f"{'.'.join(map(str, body['loc']))}: {words}" if isinstance(body.get("loc"), list) else words
    if isinstance(body, list):
        return "; ".join(map(own_words, body))
    title = re.search(r"<title>(.*?)</title>", str(body), re.IGNORECASE | re.DOTALL)
    return " ".join((title[1] if title else str(body)).split())


def thought_and_words(said: dict[str, Any]) -> tuple[str, str]:
    """What one piece of a reply holds: under `reasoning_content` or `reasoning`, and under `content`, text or a list of
    parts."""
    thoughts = said.get("reasoning_content"), said.get("reasoning")
    thought = next((text for text in thoughts if text and isinstance(text, str)), "")
    content, words = said.get("content") or "", ""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            words += part
        elif "think" in str(part.get("type")) or "reason" in str(part.get("type")):
            inner = part.get("thinking") or part.get("reasoning") or part.get("text")
            thought += inner if isinstance(inner, str) else thought_and_words({"content": inner})[1]
        else:
            words += part.get("text") or ""
    return thought, words
