"""The notebook's side: `%%chat`, `%chat` and their line magics."""

import json
import re
import string
from argparse import Namespace
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

from IPython.core.completer import CompletionContext, SimpleCompletion, context_matcher
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.display import clear_output, display
from traitlets import Bool, CaselessStrEnum, Float, Int, TraitType, Unicode

from ..conversation.llm import ChatLLM, Interrupted, Reply
from ..conversation.registry import registered
from ..errors import ChatmagicError
from ..text import did_you_mean, visible, width

if TYPE_CHECKING:
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token
    from markdown_it.utils import OptionsDict

FORMATS = ["text", "markdown", "json"]
WORDS = ["undo", "save", "load"]


def optional(trait: type[TraitType], help: str) -> TraitType:
    """A trait that `%config` sets, None by default."""
    return trait(None, allow_none=True, help=help).tag(config=True)


@magics_class
class ChatMagics(Magics):
    """Talk to a chat model. `%config ChatMagics.temperature = 0.3` sets a default of `%%chat`'s options."""

    model = optional(Unicode, "Name of the model to talk to; by default the newest.")
    system = optional(Unicode, "System prompt, instead of the model's own.")
    temperature = optional(Float, "Sampling temperature; 0 is greedy.")
    top_p = optional(Float, "Probability mass sampled from.")
    max_new_tokens = optional(Int, "Most tokens in a reply.")
    seed = optional(Int, "Seed of the sampling.")
    greedy = Bool(False, help="Always take the likeliest token.").tag(config=True)
    stream = optional(Bool, "Print replies as they come; by default as the model was created.")
    format = CaselessStrEnum(FORMATS, "text", help="How replies are shown.").tag(config=True)
    stats = Bool(False, help="Print token counts and times after a reply.").tag(config=True)

    @no_var_expand
    @magic_arguments()
    @argument("-m", "--model", metavar="NAME", help="which of the models in %%chat_models")
    @argument("--system", metavar="TEXT", help="system prompt, for this question")
    @argument("--temperature", type=float, metavar="T", help="sampling temperature; 0 is greedy")
    @argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this total probability")
    @argument("--max-new-tokens", type=int, metavar="N", help="most tokens in the reply")
    @argument("--seed", type=int, metavar="N", help="seed of the sampling")
    @argument("--greedy", action="store_true", help="always take the likeliest token")
    @argument("--thinking", choices=["on", "off"], help="whether the model is to think first, if it can be told so")
    @argument("--no-stream", action="store_true", help="show the reply once it is complete")
    @argument("--new", action="store_true", help="forget the conversation first")
    @argument("--no-history", action="store_true", help="neither show the model the conversation nor remember this")
    @argument(
        "-o",
        "--output",
        metavar="NAME",
        help="put the reply into a variable: a string with .stats and .json()",
    )
    @argument("--format", choices=FORMATS, help="how the reply is shown")
    @argument("--stats", action="store_true", help="print token counts and times after the reply")
    @argument("--vars", action="store_true", help="fill {name} and {name:format} from the notebook's variables")
    @line_cell_magic
    def chat(self, line: str, cell: str | None = None) -> Reply | None:
        """Ask a chat model.

        `%%chat` sends the cell and shows the reply as it comes; `%chat TEXT` returns the reply as a string.
        Options come first; all after them is text as it stands. `--` ends the options. What cannot be asked raises
        ChatmagicError.
        """
        args, text = self._parse(line)
        text = (text if cell is None else f"{text}\n{cell}").strip("\n")
        if not text.strip():
            raise ChatmagicError("there is nothing to send: type a question below %%chat, or after %chat")
        if args.output and (not args.output.isidentifier() or iskeyword(args.output)):
            raise ChatmagicError(f"-o takes the name of a variable, and {args.output!r} is none")
        if args.vars:
            text = fill(text, self.shell.user_ns)
        llm = self._model(args.model)
        form = args.format or self.format
        stream = llm.stream if self.stream is None else self.stream
        stream = cell is not None and stream and not args.no_stream and form != "json"
        reply = self._ask(llm, text, args, form, stream)
        if cell is not None:
            self._show(reply, form, stream)
        if args.stats or self.stats:
            print(f"[{reply.stats}]")
        if args.output:
            self.shell.push({args.output: reply})
        return reply if cell is None else None

    def _ask(self, llm: ChatLLM, text: str, args: Namespace, form: str, stream: bool) -> Reply:
        """The reply, printed as it comes if `stream`; that it is not the JSON asked for fails like all else."""
        try:
            return llm(
                text,
                stream=write if stream else False,
                system=self._option(args, "system"),
                remember=not args.no_history,
                new=args.new,
                check=Reply.json if form == "json" else None,
                **self._generation(args),
            )
        except Interrupted as stopped:
            if not stream:
                print(visible(stopped.reply))
            raise
        finally:
            if stream:
                print()

    def _generation(self, args: Namespace) -> dict:
        """The options that go to the model; what nobody set is left out."""
        generation = {name: self._option(args, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")}
        generation = {name: value for name, value in generation.items() if value is not None}
        if args.greedy or (self.greedy and args.temperature is None and args.top_p is None):
            generation["greedy"] = True
        if args.thinking:
            generation["thinking"] = args.thinking == "on"
        return generation

    def _show(self, reply: Reply, form: str, streamed: bool) -> None:
        """Show a complete reply, unless it was printed as it came and is to stay so."""
        if form == "markdown" and hasattr(self.shell, "kernel"):  # a terminal shows Markdown as it stands
            if streamed:
                clear_output(wait=True)
            display({"text/html": render_markdown(reply), "text/plain": visible(reply)}, raw=True)
        elif form == "json":
            print(json.dumps(reply.json(), ensure_ascii=False, indent=2))
        elif not streamed:
            print(visible(reply))

    @line_magic
    def chat_history(self, line: str) -> None:
        """Show the conversation, a round a line.

        `%chat_history undo` forgets the last round, `%chat_history save FILE` writes the conversation as one
        line of JSON, and `%chat_history load FILE` takes it from there. Any other word raises ChatmagicError.
        """
        llm = self._model()
        word, _, path = line.strip().partition(" ")
        path = path.strip().strip("\"'")
        if word in ("save", "load") and not path:
            raise ChatmagicError(f"%chat_history {word} needs the name of a file after it")
        if word == "save":
            return llm.save(path)
        if word == "load":
            llm.load(path)
        elif word == "undo" and not path:
            llm.history = llm.history[:-1]
        elif word:
            raise ChatmagicError(f"%chat_history knows {', '.join(WORDS)}, not {line!r}{did_you_mean(word, WORDS)}")
        print_table(
            ["round", "tokens", "question", "reply"],
            [
                [str(index), "?" if tokens is None else str(tokens), query, reply]
                for index, ((query, reply), tokens) in enumerate(zip(llm.history, llm.round_tokens()), 1)
            ],
        )

    @line_magic
    def chat_reset(self, line: str) -> None:
        """Forget the conversation, and free the memory kept for it."""
        self._model().reset()

    @line_magic
    def chat_models(self, line: str) -> None:
        """Show the models there are; `*` marks the one that is asked, where `-m` names no other.

        That is the newest, or what `%config ChatMagics.model` says.
        """
        active = self.model or "".join(list(registered)[-1:])
        print_table(
            ["", "model", "context", "rounds"],
            [
                ["*" if name == active else "", name, str(llm.backend.context or "?"), str(len(llm.history))]
                for name, llm in registered.items()
            ],
        )

    def _model(self, name: str | None = None) -> ChatLLM:
        if name := name or self.model:
            if name not in registered:
                near = did_you_mean(name, registered)
                raise ChatmagicError(f"no model is called {name!r}{near}; %chat_models shows all")
            return registered[name]
        if not registered:
            raise ChatmagicError(
                "there is no model to talk to. Create one and keep it in a variable: "
                "llm = ChatLLM(model, tokenizer), or llm = chatmagic.connect(url, model)"
            )
        return list(registered.values())[-1]

    def _option(self, args: Namespace, name: str) -> Any:
        """An option of the cell, or its default."""
        value = getattr(args, name)
        return getattr(self, name) if value is None else value

    def _parse(self, line: str) -> tuple[Namespace, str]:
        """Options, and the text after them. An option's value may be quoted; the text is left alone."""
        parser, argv, rest = ChatMagics.chat.parser, [], line.strip()
        actions = {option: action for action in parser._actions for option in action.option_strings}
        while match := OPTION.match(rest):
            option, rest = match[1], rest[match.end() :]
            if option == "--":
                break
            if option not in actions:
                raise ChatmagicError(
                    f"unknown option {option}{did_you_mean(option, actions)} (%%chat? lists all of them; -- goes "
                    "before text that begins with a dash)"
                )
            if actions[option].nargs == 0:
                if match[2]:
                    raise ChatmagicError(f"{option} takes no value")
            else:
                if not (value := VALUE.match(rest)):
                    raise ChatmagicError(
                        f"{option} needs {actions[option].metavar or actions[option].choices} after it"
                    )
                option, rest = f"{option}={value[1] or value[2] or value[3] or ''}", rest[value.end() :]
            argv.append(option)
        try:
            return parser.parse_args(argv), rest
        except UsageError as error:
            raise ChatmagicError(f"{error}. %%chat? lists the options") from None

    @context_matcher()
    def complete(self, context: CompletionContext) -> dict:
        """A matcher for options, their values, and with `--vars` the `{names` in a cell."""
        first, before = context.full_text.split("\n", 1)[0], context.text_until_cursor
        if not re.match(r"\s*%?%chat\b", first):
            return {"completions": []}
        variables = [name for name in self.shell.user_ns if not name.startswith("_")]
        if "--vars" in first and (found := re.search(r"\{(\w*)$", before)):
            words = variables
        elif context.cursor_line > 0:
            return {"completions": []}
        elif found := re.search(r"(?:-m|--model|--format|-o|--output)[\s=]+(\S*)$", before):
            words = {"m": registered, "f": FORMATS, "o": variables}[found[0].lstrip("-")[0]]
        else:
            found = re.search(r"\s(-\S*)$", before)
            words = [option for action in ChatMagics.chat.parser._actions for option in action.option_strings]
        if not found:
            return {"completions": []}
        fragment = found[1]
        return {
            "completions": [
                SimpleCompletion(word, type="param") for word in sorted(words) if word.startswith(fragment)
            ],
            "matched_fragment": fragment,
            "suppress": True,
        }


OPTION = re.compile(r"(-[^\s=]*)(=?)\s*")
VALUE = re.compile(r"""(?:"([^"]*)"|'([^']*)'|(\S+))\s*""")


class _Filler(string.Formatter):
    def get_value(self, key: int | str, args: Sequence, variables: Mapping[str, Any]) -> Any:
        if key in variables:
            return variables[key]
        raise ChatmagicError(f"--vars: there is no variable {key!r}{did_you_mean(str(key), variables)}")


def fill(text: str, variables: dict) -> str:
    """`text` with `{name}` and `{name:format}` filled in, `{{` and `}}` being braces.

    Raises ChatmagicError for a name that is no variable, and for what is no such place.
    """
    try:
        return _Filler().vformat(text, (), variables)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ChatmagicError(f"--vars: {error}. Braces that should stay are written {{{{ and }}}}") from None


def write(piece: str) -> None:
    """Print a piece of a reply as it comes."""
    print(visible(piece), end="", flush=True)


def render_markdown(text: str) -> str:
    """Markdown as HTML in which raw HTML is text and images are links: nothing in it runs or is loaded."""
    from markdown_it import MarkdownIt
    from markdown_it.common.utils import escapeHtml

    def image(self: "RendererHTML", tokens: Sequence["Token"], index: int, options: "OptionsDict", env: Any) -> str:
        source, alt = escapeHtml(tokens[index].attrs["src"]), escapeHtml(tokens[index].content)
        return f'<a href="{source}">{alt or source}</a>'

    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.add_render_rule("image", image)
    return markdown.render(text)


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """Left-aligned columns, a row a line; long cells are cut, and a wide character takes two places."""
    rows = [heads, *[[brief(cell) for cell in row] for row in rows]]
    widths = [max(map(width, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell + " " * (wide - width(cell)) for cell, wide in zip(row, widths)).rstrip())


def brief(text: str) -> str:
    """The text in one line of at most 32 characters."""
    text = " ".join(visible(text).split())
    return text if len(text) <= 32 else text[:31] + "…"


def reach_empty_cell(lines: list[str]) -> list[str]:
    """Give an empty `%%chat` cell a line: IPython would answer it, by a message that fails no cell."""
    if lines and re.match(r"%%chat(\s|$)", lines[0]) and not "".join(lines[1:]).strip():
        return [lines[0].rstrip("\n") + "\n", "\n"]
    return lines


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics, the completion of their options, and what gives an empty cell a line."""
    magics = ChatMagics(shell)
    shell.register_magics(magics)
    shell.input_transformers_cleanup.append(reach_empty_cell)
    shell.Completer.custom_matchers.append(magics.complete)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take back what `load_ipython_extension` registered."""
    magics = next(magics for magics in shell.configurables if isinstance(magics, ChatMagics))
    shell.configurables.remove(magics)
    shell.input_transformers_cleanup.remove(reach_empty_cell)
    shell.Completer.custom_matchers.remove(magics.complete)
    for kind, name in [("cell", "chat"), *(("line", name) for name in magics.magics["line"])]:
        shell.magics_manager.magics[kind].pop(name, None)
