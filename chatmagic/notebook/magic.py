"""The magics themselves: `%%chat`, `%chat` and what `%config` sets for them, and their line magics."""

import json
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from keyword import iskeyword
from typing import Any

from IPython.core.completer import CompletionContext, context_matcher
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell
from IPython.core.magic import (
    Magics,
    line_cell_magic,
    line_magic,
    magics_class,
    needs_local_scope,
    no_var_expand,
)
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.display import clear_output, display
from traitlets import Bool, CaselessStrEnum, Float, Int, TraitType, Unicode

from ..conversation.llm import ChatLLM, Interrupted, Reply
from ..conversation.printing import kernel, say
from ..conversation.registry import registered
from ..errors import ChatmagicError, let_go
from ..text import did_you_mean, visible
from .cells import AskingLine, fill, parse, tidy
from .completion import complete
from .display import print_table, render_markdown
from .folding import Folding, show_thought

FORMATS = ["text", "markdown", "json"]
WORDS = ["undo", "save", "load"]
MODEL = argument("-m", "--model", metavar="NAME", help="which of the models in %%chat_models")


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
    @needs_local_scope
    @magic_arguments()
    @MODEL
    @argument("--system", metavar="TEXT", help="system prompt, for this question")
    @argument("--temperature", type=float, metavar="T", help="sampling temperature; 0 is greedy")
    @argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this total probability")
    @argument("--max-new-tokens", type=int, metavar="N", help="most tokens in the reply")
    @argument("--seed", type=int, metavar="N", help="seed of the sampling")
    @argument("--greedy", action="store_true", help="always take the likeliest token")
    @argument("--thinking", choices=["on", "off"], help="whether the model is to think first, if it can be told so")
    @argument("--thinking-budget", type=int, metavar="N", help="most tokens of its thought")
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
    @argument("--vars", action="store_true", help="fill {expressions} and {expressions:format} as an f-string does")
    @line_cell_magic
    def chat(self, line: str, cell: str | None = None, local_ns: Mapping[str, Any] | None = None) -> Reply | None:
        """Ask a chat model.

        `%%chat` sends the cell and shows the reply as it comes; `%chat TEXT` returns the reply as a string.
        Options come first; all after them is text as it stands. `--` ends the options. What cannot be asked raises
        ChatmagicError.
        """
        args, text = parse(line, ChatMagics.chat.parser, body=bool(cell and cell.strip()))
        text = (text if cell is None else f"{text}\n{cell}").strip("\n")
        if not text.strip():
            raise ChatmagicError("there is nothing to send: type a question below %%chat, or after %chat")
        if args.output and (not args.output.isidentifier() or iskeyword(args.output)):
            raise ChatmagicError(f"-o takes the name of a variable, and {args.output!r} is none")
        if args.vars:
            text = fill(text, {**self.shell.user_ns, **(local_ns or {})})
        llm = self._model(args.model)
        form = args.format or self.format
        stream = llm.stream if self.stream is None else self.stream
        stream = cell is not None and stream and not args.no_stream and form != "json"
        reply = self._ask(llm, text, args, form, stream)
        shown = cell is not None and self._show(reply, form, stream)
        if reply.notices and (shown or not stream):  # else they were printed as they came
            say("\n".join(f"[{notice}]" for notice in reply.notices))
        if args.stats or self.stats:
            print(f"[{reply.stats}]")
        if args.output:
            self.shell.push({args.output: reply})
        return reply if cell is None else None

    def _ask(self, llm: ChatLLM, text: str, args: Namespace, form: str, stream: bool) -> Reply:
        """The reply, printed as it comes if `stream`; that it is not the JSON asked for fails like all else."""
        try:
            with Folding() if stream and kernel() else nullcontext(stream) as shown:
                return llm(
                    text,
                    stream=shown,
                    system=self._option(args, "system"),
                    remember=not args.no_history,
                    new=args.new,
                    check=Reply.json if form == "json" else None,
                    **self._generation(args),
                )
        except Interrupted as stopped:
            if not stream:
                say(stopped.reply)
            raise

    def _generation(self, args: Namespace) -> dict:
        """The options that go to the model; what nobody set is left out."""
        generation = {name: self._option(args, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")}
        generation = {name: value for name, value in generation.items() if value is not None}
        if args.greedy or (self.greedy and args.temperature is None and args.top_p is None):
            generation["greedy"] = True
        if args.thinking:
            generation["thinking"] = args.thinking == "on"
        if args.thinking_budget is not None:
            generation["thinking_budget"] = args.thinking_budget
        return generation

    def _show(self, reply: Reply, form: str, streamed: bool) -> bool:
        """Show a complete reply, unless it was printed as it came and is to stay so; whether it was shown."""
        if form == "markdown" and hasattr(self.shell, "kernel"):  # a terminal shows Markdown as it stands
            if streamed:
                clear_output(wait=True)
            if reply.thinking:
                show_thought(reply.thinking)
            display({"text/html": render_markdown(reply), "text/plain": visible(reply)}, raw=True)
        elif form == "json":
            if reply.thinking:
                show_thought(reply.thinking)
            say(json.dumps(reply.json(), ensure_ascii=False, indent=2))
        elif not streamed:
            if reply.thinking:
                show_thought(reply.thinking)
            say(reply)
        else:
            return False
        return True

    @no_var_expand
    @magic_arguments()
    @MODEL
    @line_magic
    def chat_history(self, line: str) -> None:
        """Show the conversation, a round a line.

        `%chat_history undo` forgets the last round, `%chat_history save FILE` writes the conversation as one
        line of JSON, and `%chat_history load FILE` takes it from there. Any other word raises ChatmagicError.
        """
        args, rest = parse(line, ChatMagics.chat_history.parser)
        llm = self._model(args.model)
        word, path = [*rest.split(maxsplit=1), "", ""][:2]
        path = path.strip("\"'")
        if word in ("save", "load") and not path:
            raise ChatmagicError(f"%chat_history {word} needs the name of a file after it")
        if word == "save":
            return llm.save(path)
        if word == "load":
            llm.load(path)
        elif word == "undo" and not path:
            llm.history = llm.history[:-1]
        elif word:
            raise ChatmagicError(f"%chat_history knows {', '.join(WORDS)}, not {rest!r}{did_you_mean(word, WORDS)}")
        print_table(
            ["round", "tokens", "question", "reply"],
            [
                [str(index), "?" if tokens is None else str(tokens), query, reply]
                for index, ((query, reply), tokens) in enumerate(zip(llm.history, llm.round_tokens()), 1)
            ],
        )

    @no_var_expand
    @magic_arguments()
    @MODEL
    @line_magic
    def chat_reset(self, line: str) -> None:
        """Forget the conversation, and free the memory kept for it."""
        self._model(self._only_options(line, ChatMagics.chat_reset).model).reset()

    @no_var_expand
    @magic_arguments()
    @MODEL
    @line_magic
    def chat_models(self, line: str) -> None:
        """Show the models there are; `*` marks the one that is asked, where `-m` names no other.

        That is the newest, or what `%config ChatMagics.model` says.
        """
        named = self._only_options(line, ChatMagics.chat_models).model
        shown = {named: self._model(named)} if named else registered
        active = self.model or "".join(list(registered)[-1:])
        print_table(
            ["", "model", "context", "rounds"],
            [
                ["*" if name == active else "", name, str(llm.backend.context or "?"), str(len(llm.history))]
                for name, llm in shown.items()
            ],
        )

    def _only_options(self, line: str, magic: Any) -> Namespace:
        """The options of a line magic that takes nothing else; ChatmagicError for any word."""
        args, rest = parse(line, magic.parser)
        if rest:
            raise ChatmagicError(
                f"%{magic.parser.prog} takes options alone, not {rest!r}: %{magic.parser.prog}? lists them"
            )
        return args

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

    def cell_ended(self, result: ExecutionResult) -> None:
        """A cell has run: the model and its tensors do not hang on the exception that it showed."""
        let_go(result.error_in_exec)

    @context_matcher()
    def complete(self, context: CompletionContext) -> dict:
        """A matcher for options, their values, and with `--vars` the `{names` in a cell."""
        parsers = {name: getattr(ChatMagics, name).parser for name in self.magics["line"]}
        variables = [name for name in self.shell.user_ns if not name.startswith("_")]
        return complete(context, parsers, {"model": registered, "output": variables}, variables)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics, the completion of their options, and what finds them in cells."""
    magics = ChatMagics(shell)
    shell.register_magics(magics)
    shell.input_transformers_cleanup.append(tidy)
    shell.input_transformer_manager.token_transformers.append(AskingLine)
    shell.Completer.custom_matchers.append(magics.complete)
    shell.events.register("post_run_cell", magics.cell_ended)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take back what `load_ipython_extension` registered."""
    magics = next(magics for magics in shell.configurables if isinstance(magics, ChatMagics))
    shell.configurables.remove(magics)
    shell.input_transformers_cleanup.remove(tidy)
    shell.input_transformer_manager.token_transformers.remove(AskingLine)
    shell.Completer.custom_matchers.remove(magics.complete)
    shell.events.unregister("post_run_cell", magics.cell_ended)
    for kind, name in [("cell", "chat"), *(("line", name) for name in magics.magics["line"])]:
        shell.magics_manager.magics[kind].pop(name, None)
