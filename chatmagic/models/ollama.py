"""A Modelfile: what Ollama is told of a GGUF file, prompts in Go's text/template among it."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..conversation.messages import Message, build_messages
from ..prompts.templates import NoSystemError, get_template
from .gguf import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, QUERY, REPLY, NEXT = ("Xsystem", "Xquestion", "Xreply", "Xnext")  # that no template writes


class Pieces(NamedTuple):
    """What a chat template writes around messages: at the beginning without a system text, and before one, before an
    answer that is asked for and before one that was given, behind an answer, behind a system text; the last question,
    whatever its number, is like the first."""

    begin: str
    system: str
    ask: str
    answer: str
    next: str
    after_system: str

    @property
    def default_system(self) -> str:
        """The system text that the template writes where it is given none."""
        before, after = len(self.system), len(self.begin) - len(self.after_system)
        as_system = self.begin[:before] == self.system and self.begin[max(after, 0) :] == self.after_system
        return self.begin[before:after] if as_system and self.after_system else ""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, as Ollama writes it with `go`."""
        written = "" if messages[0]["role"] == "system" else self.begin
        for index, message in enumerate(messages):
            last = index + 1 == len(messages)
            before = self.system if message["role"] == "system" else ""
            after = {"system": self.after_system, "user": self.ask if last else self.answer, "assistant": self.next}
            written += before + message["content"] + after[message["role"]]
        return written

    def go(self) -> str:
        """The same as a template for Ollama."""
        content, last = "{{ $m.Content }}", "{{ if eq (len (slice $.Messages $i)) 1 }}"
        asked = self.ask if self.ask == self.answer else f"{last}{self.ask}{{{{ else }}}}{self.answer}{{{{ end }}}}"
        return (
            "{{ range $i, $m := .Messages }}"
            f'{{{{ if eq $m.Role "system" }}}}{self.system}{content}{self.after_system}'
            f'{{{{ else if eq $m.Role "user" }}}}{{{{ if eq $i 0 }}}}{self.begin}{{{{ end }}}}{content}{asked}'
            f"{{{{ else }}}}{content}{self.next}{{{{ end }}}}{{{{ end }}}}"
        )


def find_pieces(tokenizer: "PreTrainedTokenizerBase") -> Pieces:
    """The pieces of the template that fits a tokenizer, for a model that thinks as it was trained to. Raises
    ExportError for a template that does more than put pieces between messages: one that counts rounds, for example."""
    template, thinking = get_template(None, tokenizer), getattr(tokenizer, "chat_thinking", None)
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # llama.cpp begins it so, too

    def written(messages: Sequence[Message]) -> str:
        text = "".join(span.text for span in template.render(messages, thinking=thinking))
        return text.removeprefix(tokenizer.bos_token or "") if begins else text

    def conversation(*turns: str, system: str | None = None) -> list[Message]:
        history = [*zip(turns[:-1:2], turns[1::2])]
        return build_messages(turns[-1], history, system)

    begin, answer, after, ask = _parts(written(conversation(QUERY, REPLY, NEXT)), QUERY, REPLY, NEXT)
    asks = [conversation("a"), conversation("a", "b", "c", "d", "e")]
    try:
        text = written(conversation(QUERY, system=SYSTEM))
        system, after_system, _ = _parts(text, SYSTEM, QUERY)
        asks += [conversation("a", system="s"), conversation("a", "b", "c", system="s")]
    except NoSystemError:
        system = after_system = ""
    found = Pieces(begin, system, ask, answer, after, after_system)
    if any("{{" in piece or '"""' in piece for piece in found) or any(found.render(a) != written(a) for a in asks):
        raise ExportError(
            f"Ollama's templates cannot write {template.name}, the format of this model: export it with --to gguf. "
            "llama.cpp's own server takes the chat template that is in the file."
        )
    return found


def _parts(text: str, *words: str) -> list[str]:
    """What stands around the words."""
    parts = []
    for word in words:
        part, _, text = text.partition(word)
        parts.append(part)
    return [*parts, text]


def write_modelfile(gguf: str, tokenizer: "PreTrainedTokenizerBase", generation: dict[str, Any]) -> str:
    """A Modelfile for a GGUF file beside it: template, stops, system text, and the sampling of a
    generation_config.json. Raises ExportError as `find_pieces` does."""
    pieces, template = find_pieces(tokenizer), get_template(None, tokenizer)
    stops = [tokenizer.decode([stop]) for stop in template.stop_token_ids(tokenizer)] + [*template.stop_strings]
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{pieces.go()}"""']
    lines += [f'SYSTEM """{pieces.default_system}"""'] if pieces.default_system else []
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops)]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(generation)]
    return "\n".join(lines) + "\n"


def _sampling(generation: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """As the model was published, greedily where nothing says otherwise: Ollama's own defaults are other."""
    yield "repeat_penalty", generation.get("repetition_penalty") or 1.0
    if not generation.get("do_sample"):
        yield "temperature", 0
        return
    for name, default in {"temperature": 1.0, "top_p": 1.0, "top_k": 50}.items():
        value = generation.get(name)
        yield name, default if value is None else value
