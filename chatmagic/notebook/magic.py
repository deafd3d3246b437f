"""The magics themselves: `%%chat`, `%chat` and what `%config` sets for them, and their line magics."""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from keyword import iskeyword
from typing import Any
from weakref import WeakKeyDictionary

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
from IPython.core.magic_arguments import magic_arguments
from traitlets import Bool, CaselessStrEnum, Float, Int, TraitType, Unicode

from ..conversation.llm import ChatLLM, Interrupted
from ..conversation.printing import Printer, kernel, say
from ..conversation.registry import registered
from ..conversation.reply import Reply, Totals
from ..errors import ChatmagicError, let_go
from ..text import did_you_mean, visible
from .cells import AskingLine, fill, parse, tidy
from .completion import complete
from .display import Board, print_table
from .folding import Folding, show_thought
from .keeping import Autosave, export_markdown
from .options import FORMATS, MODEL, asking
from .sources import attach, explain, output, read, told

WORDS = ["undo", "edit", "keep", "save", "load", "export"]


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
    autosave = Bool(True, help="Keep conversations, so that a restarted kernel can go on.").tag(config=True)

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self._asked: WeakKeyDictionary[ChatLLM, tuple[str, Namespace]] = WeakKeyDictionary()
        self._kept = Autosave(shell)
        self._failed = ""
        self._note(getattr(sys, "last_value", None))  # of a cell that ran before this was loaded

    @no_var_expand
    @needs_local_scope
    @asking
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
        if args.vars:
            text = fill(text, {**self.shell.user_ns, **(local_ns or {})})
        reply = self._answer(self._model(args.model), text, args, shown=cell is not None)
        return reply if cell is None else None

    @no_var_expand
    @asking
    @line_magic
    def chat_retry(self, line: str) -> None:
        """Ask the last question again, as it was asked but for these options; an answer it had is replaced.

        Raises ChatmagicError where nothing was asked.
        """
        llm = self._model(self._only_options(line, ChatMagics.chat_retry).model)
        if not (text := llm.asked or "".join(query for query, _ in llm.history[-1:])):
            raise ChatmagicError("there is no question to ask again: the conversation is empty")
        earlier, known = self._asked.get(llm, ("", None))
        known = copy(known) if known and earlier == text else ChatMagics.chat.parser.parse_args([])
        known.file = None  # it is in the text
        if number := llm.answered:
            known.new, known.round = False, number
        elif known.round and known.round > len(llm.history):
            known.round = None  # that round was undone
        args, _ = parse(line, ChatMagics.chat_retry.parser, known=known)
        self._answer(llm, text, args)

    @no_var_expand
    @asking
    @line_magic
    def chat_explain(self, line: str) -> None:
        """Ask why the last cell that failed did so: sends the cell, its error, and TEXT as the question.

        Raises ChatmagicError where none did.
        """
        args, text = parse(line, ChatMagics.chat_explain.parser)
        llm = self._model(args.model)
        if not self._failed:
            raise ChatmagicError("no cell has failed since chatmagic was loaded")
        self._answer(llm, self._failed + (text or explain("".join(query for query, _ in llm.history))), args)

    def _answer(self, llm: ChatLLM, text: str, args: Namespace, shown: bool = True) -> Reply:
        """Ask, and do with the reply what the options say; `shown` as it comes, or not at all."""
        if args.output and (not args.output.isidentifier() or iskeyword(args.output)):
            raise ChatmagicError(f"-o takes the name of a variable, and {args.output!r} is none")
        form, stream = args.format or self.format, llm.stream if self.stream is None else self.stream
        stream = shown and stream and not args.no_stream and form != "json"
        markdown = shown and form == "markdown" and hasattr(self.shell, "kernel")  # a terminal shows text
        attached = [self._attached(name) for name in args.file or ()]
        text = "".join(each for each, _ in attached) + text
        self._asked[llm] = (text, args)
        if markdown:
            board = Board(live=stream)
            with Folding(board, live=stream) as printer:
                reply = self._ask(llm, text, args, form, printer)
                board.finish(reply)
        else:
            with Folding(Printer()) if stream and kernel() else nullcontext(stream) as printer:
                reply = self._ask(llm, text, args, form, printer)
            if shown and not stream and reply.thinking:
                show_thought(reply.thinking)
        if shown and form == "json":
            say(json.dumps(reply.json(), ensure_ascii=False, indent=2))
        elif shown and not stream and not markdown:
            say(reply)
        below = [f"[{size}]" for _, size in attached]
        if markdown or not stream:  # else they were printed as they came
            below += [f"[{notice}]" for notice in reply.notices]
        if args.stats or self.stats:
            below.append(f"[{reply.stats}]")
        if args.code and (code := reply.code()):
            self.shell.set_next_input(visible(code))
        elif args.code:
            below.append("[the reply has no Python code to put into a cell]")
        if below:
            say("\n".join(below))
        if args.output:
            self.shell.push({args.output: reply})
        return reply

    def _attached(self, name: str) -> tuple[str, str]:
        """What `--file` sends, and how much that is."""
        cell = re.fullmatch(r"Out\[(\d+)\]", name)
        text = output(self.shell, int(cell[1])) if cell else read(name)
        return attach(name, text), f"{name}: {len(text):,} characters"

    def _ask(self, llm: ChatLLM, text: str, args: Namespace, form: str, stream: bool | Folding) -> Reply:
        """The reply, shown as it comes if `stream`; that it is not the JSON asked for fails like all else."""
        if (system := self._option(args, "system")) and system.startswith("@"):
            system = read(system[1:]).strip()

        def is_json(reply: Reply) -> None:
            try:
                reply.json()
            except ChatmagicError:
                say(reply)
                if args.output:
                    self.shell.push({args.output: reply})
                raise

        try:
            return llm(
                text,
                stream=stream,
                system=system,
                remember=not args.no_history,
                new=args.new,
                round=args.round,
                check=is_json if form == "json" else None,
                **self._generation(args),
            )
        except Interrupted as stopped:
            if not stream:
                say(stopped.reply)
            raise

    def _generation(self, args: Namespace) -> dict[str, Any]:
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

    @no_var_expand
    @magic_arguments()
    @MODEL
    @line_magic
    def chat_history(self, line: str) -> None:
        """Show the conversation, a round a line; a word after it changes, saves or loads it.

        `undo [N]` forgets the last rounds, `edit [N]` puts the question of a round into the next cell, to be asked in
        the place of that round and all after it, `keep` remembers a reply that was stopped. `save FILE` writes the
        conversation as one line of JSON, `load FILE` takes it from there, `load` from what an earlier kernel left,
        `export FILE.md` writes Markdown. Any other word raises ChatmagicError.
        """
        args, rest = parse(line, ChatMagics.chat_history.parser)
        llm = self._model(args.model)
        word, value = [*rest.split(maxsplit=1), "", ""][:2]
        value = value.strip("\"'")
        if word in ("save", "export") and not value:
            raise ChatmagicError(f"%chat_history {word} needs the name of a file after it")
        if word == "save":
            return llm.save(value)
        if word == "export":
            return export_markdown(llm, value)
        if word == "edit":
            number = self._count(llm, word, value, default=len(llm.history))
            named = f' -m "{args.model}"' if args.model else ""
            return self.shell.set_next_input(f"%%chat{named} --round {number}\n{visible(llm.history[number - 1][0])}")
        if word == "load":
            if not (file := value or self._kept.before(llm)):
                raise ChatmagicError("nothing is kept of an earlier kernel here: %chat_history load FILE")
            llm.load(file)
        elif word == "undo":
            llm.history = llm.history[: -self._count(llm, word, value, default=1)]
        elif word == "keep" and not value:
            llm.keep()
        elif word:
            raise ChatmagicError(f"%chat_history knows {', '.join(WORDS)}, not {rest!r}{did_you_mean(word, WORDS)}")
        print_table(
            ["round", "tokens", "question", "reply"],
            [
                [str(index), "?" if tokens is None else str(tokens), query, reply]
                for index, ((query, reply), tokens) in enumerate(zip(llm.history, llm.round_tokens()), 1)
            ],
        )

    def _count(self, llm: ChatLLM, word: str, value: str, default: int) -> int:
        """The number after a word, of a round that there is."""
        number = int(value) if value.isdecimal() else 0 if value else default
        if not 1 <= number <= len(llm.history):
            raise ChatmagicError(
                f"%chat_history {word} takes a number from 1 to {len(llm.history)}, not {value or default}: so many "
                "rounds are remembered"
            )
        return number

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
        """Show the models there are, and how many tokens they were sent and have said so far; `*` marks the one that is
        asked, where `-m` names no other.

        That is the newest, or what `%config ChatMagics.model` says.
        """
        named = self._only_options(line, ChatMagics.chat_models).model
        shown = {named: self._model(named)} if named else registered
        active = self.model or "".join(list(registered)[-1:])
        heads = ["", "model", "context", "rounds", "tokens in", "tokens out"]
        rows = [
            [
                "*" if name == active else "",
                name,
                llm.backend.context or "?",
                len(llm.history),
                *tokens_known(llm.totals),
            ]
            for name, llm in shown.items()
        ]
        print_table(heads, [[str(cell) for cell in row] for row in rows])

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

    def _note(self, error: BaseException | None, cell: str | None = None) -> None:
        if error and not isinstance(error, (ChatmagicError, KeyboardInterrupt)):  # which say themselves what to do
            self._failed = told(error, cell)

    def cell_ended(self, result: ExecutionResult) -> None:
        """A cell has run: keep the conversations, and of its error what `%chat_explain` sends. No model hangs on it."""
        error = result.error_before_exec or result.error_in_exec
        self._note(error, result.info.raw_cell)
        let_go(error)
        if self.autosave:
            self._kept.look(list(registered.values()))

    @context_matcher()
    def complete(self, context: CompletionContext) -> dict[str, Any]:
        """A matcher for options, their values, and with `--vars` the `{names` in a cell."""
        parsers = {name: getattr(ChatMagics, name).parser for name in self.magics["line"]}
        variables = [name for name in self.shell.user_ns if not name.startswith("_")]
        return complete(context, parsers, {"model": registered, "output": variables}, variables)


def tokens_known(totals: Totals) -> list[int | str]:
    """Tokens in and out; "?" where a server told nothing of its replies."""
    told = totals.tokens_in or totals.tokens_out or not totals.replies
    return [totals.tokens_in, totals.tokens_out] if told else ["?", "?"]


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
