"""What people write into a cell: `%%chat` and `%chat` wherever they stand, their options, and `{expressions}`."""

import re
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from keyword import iskeyword
from typing import Any

from IPython.core.error import UsageError
from IPython.core.inputtransformer2 import EscapedCommand

from ..errors import ChatmagicError
from ..text import did_you_mean

# Reaching the magics


class AskingLine(EscapedCommand):
    """`%chat TEXT`, `x = %chat TEXT`, `return %chat TEXT` and `%time %chat TEXT`, before IPython takes a question mark
    at the end of it for its own (`HelpEnd`), and with any blank after the name, where IPython knows the space alone.
    `%chat?` is help."""

    def __init__(self, start: tuple[int, int]) -> None:
        super().__init__(start)
        self.mark, self.start_col = start[1], -1  # sorted before all else on the line

    @classmethod
    def find(cls, tokens_by_line: list[list[Any]]) -> "AskingLine | None":
        """The first such line, of tokens grouped by lines."""
        for tokens in tokens_by_line:
            marks = [token for token in tokens if token.string == "%"]
            chats = [mark.start for mark in marks if CHAT.match(mark.line, mark.start[1])]
            for mark in marks if chats else ():
                before = [token.string for token in tokens if token.start < mark.start and token.string.strip()]
                open_brackets = sum((each in "([{") - (each in ")]}") for each in before)
                begins = not before or iskeyword(before[-1]) or before[-1] in {"=", "+=", ":=", ":", ";"}
                if begins and not open_brackets and mark.start <= chats[-1]:
                    return cls(mark.start)
        return None

    def transform(self, lines: list[str]) -> list[str]:
        """The lines, that one being a call."""
        self.start_col = self.mark
        spaced = CHAT.sub(r"\1 ", lines[self.start_line], count=1)
        return super().transform([*lines[: self.start_line], spaced, *lines[self.start_line + 1 :]])


CHAT = re.compile(r"(%chat\w*)[^\S\n]+")


def tidy(lines: list[str]) -> list[str]:
    """Let `%%chat` begin its cell, as IPython wants it: without the comments and `#|` that people, Quarto and VS Code
    write above it, with a space after it, a body if it has none (IPython would answer that in a way which fails no
    cell), and lines that end as everywhere."""
    first = next((index for index, line in enumerate(lines) if re.match(r"\s*[^\s#]", line)), 0)
    if not lines or not (found := CELL.match(lines[first])):
        return lines
    asked, *body = [re.sub(r"\r\n?$", "\n", line) for line in lines[first:]]
    asked = f"%%chat {asked[found.end() :].strip()}".rstrip() + "\n"
    return [asked, *body] if "".join(body).strip() else [asked, "\n"]


tidy.has_side_effects = True  # type: ignore[attr-defined]  # to IPython: not for telling whether a cell in a terminal goes on
CELL = re.compile(r"[\s\ufeff\u200b]*%%chat\u200b*(?=\s|$)")

# Options


def parse(
    line: str, parser: ArgumentParser, body: bool = False, known: Namespace | None = None
) -> tuple[Namespace, str]:
    """Options, and the text after them, as it stands. `body`: whether a cell's text follows the line; `known`:
    what holds where the line says nothing.

    A value may be quoted, curly or not. The value of an option of many words, quoted or not, ends at the next option;
    unquoted it may not stand before text. Raises ChatmagicError for what is no option, and no value.
    """
    argv, rest = [], line.strip()
    actions = {option: action for action in parser._actions for option in action.option_strings}
    while match := OPTION.match(rest):
        option, rest = match[1], rest[match.end() :]
        if option == "--":
            break
        if option not in actions:
            raise ChatmagicError(_no_option(option, actions, parser.prog))
        if actions[option].nargs == 0:
            if match[2]:
                raise ChatmagicError(f"{option} takes no value")
        else:
            value, rest = _value(option, actions, rest, body)
            option = f"{option}={value}"
        argv.append(option)
    if (dash := re.match(r"[—–－−]+([\w-]+)", rest)) and (meant := {f"--{dash[1]}", f"-{dash[1]}"} & actions.keys()):
        raise ChatmagicError(f"{dash[0]} begins with a long dash; the option is {min(meant)}")
    try:
        return parser.parse_args(argv, known), rest
    except UsageError as error:
        raise ChatmagicError(f"{error}. %{parser.prog}? lists the options") from None


def _no_option(option: str, actions: Mapping[str, Action], magic: str) -> str:
    return (
        f"unknown option {option}{did_you_mean(option, actions)} (%{magic}? lists all of them; -- goes "
        "before text that begins with a dash)"
    )


def _value(option: str, actions: Mapping[str, Action], rest: str, body: bool) -> tuple[str, str]:
    """The value of an option, and what follows it."""
    if not rest:
        raise ChatmagicError(f"{option} needs {actions[option].metavar or actions[option].choices} after it")
    for opening, closing in QUOTES.items():
        if rest[0] in opening:
            if not (quoted := re.match(rf".(.*?)(?<!\\)[{closing}](?:\s+|$)", rest)):
                raise ChatmagicError(f"the quote {rest[0]} after {option} is not closed by {closing[-1]} and a space")
            return re.sub(rf"\\([{closing}])", r"\1", quoted[1]), rest[quoted.end() :]
    word, after = [*re.split(r"\s+", rest, maxsplit=1), ""][:2]
    if actions[option].metavar != "TEXT" or not after:
        return word, after
    ends = (each for each in re.finditer(r"\s+(-[^\s=]*)", rest) if each[1] in {*actions, "--"})
    end = next(ends, None)
    value, after = (rest[: end.start()], rest[end.start(1) :]) if end else (rest, "")
    if not end and not body:
        raise ChatmagicError(
            f'{option} of several words goes into quotes where a question follows on its line: {option} "{word} …"'
        )
    return value, after


OPTION = re.compile(r"(-[^\s=]*)(=?)\s*")
QUOTES = {'"': '"', "'": "'", "“”„": "“”", "‘’‚": "‘’", "「": "」", "『": "』", "＂": "＂"}

# Variables

MOST = 20_000
"""Characters that a table or an array may add to a question; beyond that it is refused, not abridged."""
LONGEST = 500
"""Characters that an expression may have."""


def fill(text: str, variables: Mapping[str, Any]) -> str:
    """`text` with `{expression}` and `{expression:format}` filled in as in an f-string, `{{` and `}}` being braces.

    A table or array is written out whole. Raises ChatmagicError where that would be too long, for an expression that
    fails, and for what is none.
    """
    parts, rest = [], text
    while brace := re.search(r"[{}]", rest):
        parts.append(rest[: brace.start()])
        rest = rest[brace.start() :]
        if rest[:2] in ("{{", "}}"):
            parts.append(rest[0])
            rest = rest[2:]
        else:
            field, code, conversion, form = _field(rest)
            parts.append(_filled(field, code, conversion, form, variables))
            rest = rest[len(field) :]
    return "".join([*parts, rest])


def _field(text: str) -> tuple[str, Any, str, str]:
    """The field that the text begins with, its compiled expression, its conversion ("r", "s", "a" or "") and format."""
    for end in (match.end() for match in re.finditer("}", text[:LONGEST]) if text[0] == "{"):
        inner = text[1 : end - 1]
        marks = [match.start() for match in re.finditer("[:!]", inner)]
        for mark in [len(inner), *marks]:
            tail = re.fullmatch(r"(?s)(?:!([rsa]))?(?::(.*))?", inner[mark:])
            form = tail[2] or "" if tail else ""
            if tail and inner[:mark].strip() and form.count("{") == form.count("}"):
                try:
                    code = compile(f"({inner[:mark].strip()}\n)", "--vars", "eval")
                except (SyntaxError, ValueError):
                    continue
                return text[:end], code, tail[1] or "", form
    raise ChatmagicError(
        f"--vars: there is no expression in {text[:30]!r}. Braces that should stay are written {{{{ and }}}}"
    )


def _filled(field: str, code: Any, conversion: str, form: str, variables: Mapping[str, Any]) -> str:
    converts: dict[str, Callable[[Any], str]] = {"r": repr, "s": str, "a": ascii}
    convert = converts.get(conversion)
    try:
        value = eval(code, dict(variables))
        if convert or form:
            return format(convert(value) if convert else value, fill(form, variables))
        return _whole(field, value)
    except NameError as error:
        near = did_you_mean(error.name or "", variables)
        raise ChatmagicError(f"--vars: there is no variable {error.name!r}{near}") from None
    except ChatmagicError:
        raise
    except Exception as error:
        raise ChatmagicError(
            f"--vars: {field}: {type(error).__name__}: {error}. Braces that should stay are written {{{{ and }}}}"
        ) from None


def _whole(field: str, value: Any) -> str:
    """The value as text: tables and arrays in full, where `str` would leave out their middle."""
    library, kind = type(value).__module__.partition(".")[0], type(value).__name__
    if (library, kind) not in IN_FULL:
        return str(value)
    size = value.numel() if library == "torch" else value.size
    text = IN_FULL[library, kind](value) if size <= MOST else ""
    if not text or len(text) > MOST:
        how = f"{len(text):,} characters" if text else f"{size:,} values"
        raise ChatmagicError(
            f"--vars: {field} is a {kind} of {how}, and up to {MOST:,} characters go whole. Send a part of it, such as "
            f"{{{field.strip('{}')}[:20]}}, or what is told of it in few words"
        )
    return text


def _array(value: Any) -> str:
    return sys.modules["numpy"].array2string(value, threshold=sys.maxsize)


def _table(value: Any) -> str:
    with sys.modules["pandas"].option_context("display.max_colwidth", None):
        return value.to_string()


IN_FULL: dict[tuple[str, str], Callable[[Any], str]] = {
    ("pandas", "DataFrame"): _table,
    ("pandas", "Series"): _table,
    ("numpy", "ndarray"): _array,
    ("torch", "Tensor"): lambda value: str(value.tolist()),
    ("torch", "Parameter"): lambda value: str(value.tolist()),
}
