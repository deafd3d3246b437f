"""The magics, typed into a testing shell and answered by a fake model."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from chatmagic import ChatLLM, ChatmagicError, load_model
from chatmagic.conversation.llm import Interrupted
from chatmagic.conversation.pieces import Thought
from chatmagic.conversation.registry import registered
from chatmagic.notebook.magic import ChatMagics
from fake_model import FakeModel
from shell import Shell

# Asking


def test_a_cell_prints_the_reply_and_remembers_the_round(run, llm):
    assert run("%%chat\n你好") == "1: 你好\n"
    assert run("%%chat\nwho?\n") == "2: who?\n"
    assert llm.history == [("你好", "1: 你好"), ("who?", "2: who?")]


def test_a_cell_streams_piece_by_piece(run, llm, monkeypatch):
    calls = []
    monkeypatch.setattr("builtins.print", lambda *text, **keywords: calls.append((*text, keywords)))
    run.ip.run_cell("%%chat\nhi")
    assert calls == [(c, {"end": "", "flush": True}) for c in "1: hi"] + [({},)]


@pytest.mark.parametrize("off", ["%%chat --no-stream\nhi", "%config ChatMagics.stream = False", "llm.stream = False"])
def test_streaming_switched_off(run, llm, monkeypatch, off):
    run.ip.push({"llm": llm})
    if not off.startswith("%%"):
        run(off)
        off = "%%chat\nhi"
    calls = []
    monkeypatch.setattr("builtins.print", lambda *text, **keywords: calls.append((*text, keywords)))
    run.ip.run_cell(off)
    assert calls == [("1: hi\n", {"end": "", "flush": False})]


def test_a_line_returns_the_reply(run, llm):
    assert "1: 你好" in run("%chat 你好") and run.result == "1: 你好"
    assert run("x = %chat  你好 ") == "" and run.ip.user_ns["x"] == "2: 你好"


@pytest.mark.parametrize(
    "text",
    [
        "what's this",
        'say "hi" -- now',
        r"C:\new\table",
        "a {x} $y {{z}} `c`",
        "2 - 1 --seed 3",
        "x = {'a': 1}",
    ],
)
def test_text_is_text_as_it_stands(run, llm, fake, text):
    run.ip.push({"x": 1, "y": 2})
    for cell in (
        f"%chat {text}",
        f"%chat --greedy -- {text}",
        f"%%chat\n{text}",
        f"%%chat --greedy {text}\n",
    ):
        run(cell)
        assert fake.asked[-1][0][-1]["content"] == text


def test_options_reach_the_model(run, llm, fake):
    run("%%chat --temperature 0.5 --top-p=0.9 --max-new-tokens 20 --seed 7 --system 'be \"brief\"'\nhi")
    messages, options = fake.asked[-1]
    assert messages[0] == {"role": "system", "content": 'be "brief"'}
    assert options == {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 20, "seed": 7}
    run("%%chat --greedy\nhi")
    assert fake.asked[-1][1] == {"greedy": True, "max_new_tokens": 512}
    run("%%chat --thinking off\nhi")
    assert fake.asked[-1][1] == {"thinking": False, "max_new_tokens": 512}
    assert fake.asked[-1][0][0]["role"] == "user"  # a system text belongs to its question


def test_config_sets_defaults_and_the_cell_overrides_them(run, llm, fake):
    defaults = "temperature = 0.5", "top_p = 0.9", "max_new_tokens = 9", "seed = 7", "greedy = True"
    for default in (*defaults, "system = 'brief'"):
        run(f"%config ChatMagics.{default}")
    run("%%chat\nhi")
    messages, options = fake.asked[-1]
    assert options == {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 9, "seed": 7, "greedy": True}
    assert messages[0] == {"role": "system", "content": "brief"}
    run("%%chat --temperature 0.8 --top-p 1 --max-new-tokens 8 --seed 6 --system long\nhi")
    messages, options = fake.asked[-1]  # asked to sample, it does not stay greedy
    assert options == {"temperature": 0.8, "top_p": 1, "max_new_tokens": 8, "seed": 6}
    assert messages[0]["content"] == "long"


def test_config_sets_how_replies_are_shown(run, llm, fake):
    fake.reply = lambda turn, question: '{"a":1}'
    run("%config ChatMagics.format = 'json'"), run("%config ChatMagics.stats = True")
    assert re.fullmatch(r'\{\n  "a": 1\n\}\n\[.*, stop\]\n', run("%%chat\nhi"))
    assert run("%%chat --format text\nhi").startswith('{"a":1}\n[')


def test_new_and_no_history(run, llm, fake):
    run("%%chat\na"), run("%%chat --no-history\nb")
    assert len(fake.asked[-1][0]) == 1 and llm.history == [("a", "1: a")]
    run("%%chat --new\nc")
    assert len(fake.asked[-1][0]) == 1 and llm.history == [("c", "1: c")]


def test_the_reply_goes_into_a_variable_with_what_it_cost(run, llm):
    run("%%chat -o answer\nhi")
    answer = run.ip.user_ns["answer"]
    assert answer == "1: hi" and answer.query == "hi" and answer.model == "fake"
    assert (answer.stats.tokens_in, answer.stats.tokens_out, answer.stats.stop_reason) == (2, 5, "stop")
    assert answer.stats.seconds_to_first_token > 0 and answer.stats.tokens_per_second > 0


def test_stats(run, llm):
    reply, cut, stats = run("%%chat --stats --max-new-tokens 4\nhi").splitlines()
    form = r"\[2 tokens in \(0 kept\), 4 out, first after \d+\.\d\d s, \d+\.\d tokens/s, length\]"
    assert reply == "1: h" and cut.startswith("[cut after 4 tokens: ") and re.fullmatch(form, stats)


@pytest.mark.parametrize("options", ["", "--no-stream ", "--format markdown ", "--format markdown --no-stream "])
def test_that_a_reply_was_cut_is_said_in_one_line(run, llm, options):
    out = run(f"%%chat {options}--max-new-tokens 4\nhi")
    assert re.fullmatch(r"1: h\n\[cut after 4 tokens: [^\n]*\]\n", out)
    assert run.ip.user_ns.get("x") is None and "[cut" in run("x = %chat --max-new-tokens 4 hi")
    assert run.ip.user_ns["x"] == "2: h"


def test_variables_are_filled_only_when_asked(run, llm, fake):
    run.ip.push({"name": "小明", "pi": 3.14159, "d": {"k": [1, 2]}})
    run("%%chat --vars\n{name} {pi:.2f} {d['k']} {name!r} {{json}}")
    assert fake.asked[-1][0][-1]["content"] == "小明 3.14 [1, 2] '小明' {json}"
    run("%%chat\n{name} {{json}}")
    assert fake.asked[-1][0][-1]["content"] == "{name} {{json}}"


@pytest.mark.slow
def test_the_seeds_cells_run_with_their_import_lines_changed(run, shared, golden_models):
    """From `ChatLLM(...)` to the first loss, as the course's text has them, on its model in miniature."""
    text = next((shared / "seed").glob("*.md")).read_text("utf-8")
    cells = re.findall(r"```Python\n(.*?)```", text, re.DOTALL)
    first = next(n for n, cell in enumerate(cells) if cell.startswith("from torchkeras.chat import ChatLLM"))
    last = next(n for n, cell in enumerate(cells) if cell.startswith("len(dl_train)"))
    model, tokenizer = load_model(golden_models / "baichuan2-7b-chat", dtype="float32")
    run("import torch")
    run.ip.push({"model": model, "tokenizer": tokenizer})
    for cell in cells[first : last + 1]:
        printed = run(cell.replace("from torchkeras.chat import", "from chatmagic import"))
        if cell.startswith("%%chat"):
            reply, cut = printed.splitlines()
            assert reply == run.ip.user_ns["llm"].history[-1][1] and cut.startswith("[cut after 8 tokens")
        result = run.result
        run("llm.max_new_tokens = 8")
    asked = [query for query, _ in run.ip.user_ns["llm"].history]
    assert asked == ["世界上最高的山峰是什么", "你叫什么名字呀?"]
    assert run.ip.user_ns["out"].loss > 0 and result == 4


# Formats


def test_json_is_parsed_or_fails(run, llm, fake):
    fake.reply = lambda turn, question: question
    assert run('%%chat --format json -o r\n{"名": [1]}') == '{\n  "名": [\n    1\n  ]\n}\n'
    assert run.ip.user_ns["r"].json() == {"名": [1]}
    run.fails("%%chat --format json -o r\n{'a': 1}", "not JSON", "begins \"{'a'", "--max-new-tokens")
    assert len(llm.history) == 1 and run.ip.user_ns["r"] == "{'a': 1}"  # to see what can be made of it
    assert "{'a': 1}\n" in run.printed and "there it reads \"'a': 1}\"" in run.printed
    run('%%chat --format json -o r\nHere you are:\n\n```json\n{"a": 1}\n```\nGood luck!')
    assert run.ip.user_ns["r"].json() == {"a": 1} and run.printed == '{\n  "a": 1\n}\n'


def test_markdown_in_a_terminal_is_text(run, llm):
    assert run("%%chat --format markdown\n**hi**") == "1: **hi**\n"


def test_control_characters_are_shown_not_obeyed(run, llm, fake):
    fake.reply = lambda turn, question: "a\x1b]52;c;x\x07\rb\tc\n\x00\x7f\x9b2J"
    assert run("%%chat\nhi") == run("%%chat --no-stream\nhi") == "a␛]52;c;x␇␍b\tc\n␀␡\ufffd2J\n"


# Models


def test_the_newest_model_is_active_and_others_answer_to_their_names(run, llm):
    other = ChatLLM(FakeModel(context=100), name="other")
    other.history = [("q", "a")]
    assert run("%%chat\nhi") == "2: hi\n" and run("%%chat -m fake\nhi") == "1: hi\n"
    run("%config ChatMagics.model = 'fake'")
    assert run("%%chat\nhi") == "2: hi\n"
    assert run("%chat_models") == (
        "   model  context  rounds  tokens in  tokens out\n"
        "*  fake   ?        2       11         10\n"
        "   other  100      2       4          5\n"
    )
    run.fails("%%chat -m othr\nhi", "no model is called 'othr'", "did you mean 'other'?")
    run("%config ChatMagics.model = 'gone'")
    run.fails("%%chat\nhi", "no model is called 'gone'", "%chat_models shows all")
    assert run("%chat_models").count("fake") == 1


def test_creating_a_chatllm_loads_the_magic(ipython, capsys, fake):
    registered.clear()
    assert "chatmagic" not in ipython.extension_manager.loaded
    llm = ChatLLM(fake)
    assert fake.asked == [] and capsys.readouterr() == ("", "")
    assert Shell(ipython, capsys)("%%chat\nhi") == "1: hi\n" and llm.history
    ipython.extension_manager.unload_extension("chatmagic")
    assert "chat" not in ipython.magics_manager.magics["cell"]


def test_reloading_keeps_the_models_and_adds_nothing_twice(run, llm):
    hooks = (
        len(run.ip.input_transformers_cleanup),
        len(run.ip.Completer.custom_matchers),
        len(run.ip.configurables),
    )
    run("%reload_ext chatmagic")
    assert run("%%chat\nhi") == "1: hi\n"
    assert hooks == (
        len(run.ip.input_transformers_cleanup),
        len(run.ip.Completer.custom_matchers),
        len(run.ip.configurables),
    )


def test_a_deleted_model_is_gone(run):
    run("from fake_model import FakeModel; from chatmagic import ChatLLM; llm = ChatLLM(FakeModel())")
    assert run("%%chat\nhi") == "1: hi\n"
    run("del llm")
    run.fails("%%chat\nhi", "no model to talk to", "llm = ChatLLM(model, tokenizer)", "chatmagic.connect(")


# History


def test_history(run, llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("%%chat\n你是谁？\n第二行"), run("%%chat\n" + "x" * 60)
    table = [
        "round  tokens  question                          reply",
        "1      19      你是谁？ 第二行                   1: 你是谁？ 第二行",
    ]
    assert run("%chat_history").splitlines()[:2] == table
    assert run.printed.splitlines()[2] == f"2      123     {'x' * 31}…  2: {'x' * 28}…"
    assert run('%chat_history save my "chat".jsonl') == "" and (tmp_path / 'my "chat".jsonl').is_file()
    assert run("%chat_history undo").splitlines() == [line.replace(" " * 17, "") for line in table]
    assert run("%chat_reset") == "" and llm.history == []
    assert run("%chat_history") == "round  tokens  question  reply\n"
    run('%chat_history load my "chat".jsonl')
    assert [query for query, _ in llm.history] == ["你是谁？\n第二行", "x" * 60]


@pytest.mark.parametrize(
    "line, words",
    [
        ("sav x", ["undo, edit, keep, save, load, export", "did you mean 'save'?"]),
        ("save", ["needs the name of a file"]),
        ("load nowhere.jsonl", ["nowhere.jsonl", "No such file"]),
        ("save no/such/folder", ["There is no folder", "no/such"]),
        ("undo 2", ["a number from 1 to 0, not 2"]),
        ("undo x", ["not x"]),
        ("edit", ["a number from 1 to 0"]),
        ("edit 0", ["not 0"]),
        ("keep", ["no part of a reply"]),
        ("keep it", ["undo, edit, keep"]),
        ("export", ["needs the name of a file"]),
        ("load", ["nothing is kept of an earlier kernel"]),
    ],
)
def test_history_refuses(run, llm, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    run.fails(f"%chat_history {line}", *words)


# Failures


@pytest.mark.parametrize(
    "cell, words",
    [
        (
            "%%chat --temprature 1\nhi",
            ["unknown option --temprature", "did you mean '--temperature'?", "%chat?"],
        ),
        ("%chat --temp 1 hi", ["unknown option --temp", "--temperature"]),
        ("%chat -5 是负数吗", ["unknown option -5", "-- goes before text"]),
        ("%%chat --system\nhi", ["--system needs TEXT"]),
        ("%%chat --seed x\nhi", ["--seed: invalid int value: 'x'"]),
        ("%%chat --greedy=1\nhi", ["--greedy takes no value"]),
        ("%%chat --format html\nhi", ["'html'", "text", "markdown", "json"]),
        ("%%chat --temperature -1\nhi", ["temperature must be a number, 0 (greedy) or more, not -1.0"]),
        ("%%chat -o 2x\nhi", ["-o takes the name of a variable", "'2x'"]),
        ("%%chat -o class\nhi", ["-o takes the name of a variable", "'class'"]),
        ('%%chat --system "You are\nhi', ['the quote " after --system is not closed']),
        ("%%chat --system “You are\nhi", ["the quote “ after --system is not closed by ”"]),
        ("%%chat --system 'what\nhi", ["the quote ' after --system is not closed"]),
        ('%%chat -m "my model\nhi', ['the quote " after -m is not closed']),
        ("%%chat —greedy\nhi", ["—greedy begins with a long dash; the option is --greedy"]),
        ("%%chat –m fake\nhi", ["the option is -m"]),
        ("%%chat －－seed 3\nhi", ["the option is --seed"]),
        ("%%chat", ["nothing to send"]),
        ("%%chat\n", ["nothing to send"]),
        ("%%chat --greedy\n \n\n", ["nothing to send"]),
        ("\n%%chat\n\t", ["nothing to send"]),
        ("%chat", ["nothing to send"]),
        ("%chat --greedy", ["nothing to send"]),
    ],
)
def test_a_cell_that_cannot_be_sent(run, llm, fake, cell, words):
    run.fails(cell, *words)
    assert fake.asked == [] and llm.history == []


def test_without_a_model(run):
    for cell in ("%%chat\nhi", "%chat hi", "%chat_history", "%chat_reset"):
        run.fails(cell, "no model to talk to")
    assert run("%chat_models") == "  model  context  rounds  tokens in  tokens out\n"


@pytest.mark.parametrize("option", ["", "--no-stream", "--new", "--format json"])
def test_an_interrupted_cell_shows_what_there_is(run, llm, fake, option):
    run("%%chat\na")
    fake.failure = KeyboardInterrupt()
    run.fails(f"%%chat {option}\nhi", "stopped by you after 3 tokens", "as it was before", kind=Interrupted)
    assert run.printed.startswith(("1: " if option == "--new" else "2: ") + "\nInterrupted: ")
    assert llm.history == [("a", "1: a")]
    assert run("%%chat\nb") == "2: b\n"


def test_a_failing_model_is_one_paragraph_and_forgets_nothing(run, llm, fake):
    run("%%chat\na")
    fake.failure = ChatmagicError("no server answers at http://x: start it")
    run.fails("%%chat --new\nb", "no server answers at http://x: start it")
    assert llm.history == [("a", "1: a")]


# Help and completion


def test_help_lists_every_option(run):
    text = run.ip.find_cell_magic("chat").__doc__
    options = "-m --system --temperature --top-p --max-new-tokens --seed --greedy --no-stream --new"
    for option in [*options.split(), "--no-history", "-o", "--format", "--stats", "--vars"]:
        assert f"{option} " in text


@pytest.mark.parametrize("page", ["chat.md", "chat.en.md"])
def test_the_docs_have_every_option_default_and_test(page):
    root = Path(__file__).parents[2]
    text = (root / "docs" / page).read_text("utf-8")
    options = [option for action in ChatMagics.chat.parser._actions for option in action.option_strings]
    for name in [*options, *ChatMagics.class_own_traits(config=True)]:
        assert f" `{name}" in text, name
    tests = "".join(path.read_text("utf-8") for path in (root / "tests").rglob("test_*.py"))
    named = re.findall(r"::(test_\w+)", text)
    assert len(named) > 10 and [name for name in named if f"def {name}(" not in tests] == []


def completions(run, code):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(c.start, c.end, c.text) for c in run.ip.Completer.completions(code, len(code))]


@pytest.mark.parametrize("action", ChatMagics.chat.parser._actions, ids=lambda action: action.dest)
def test_every_option_is_explained_and_completed(run, action):
    """Its row in the docs and the test of it: see above, and CONTRIBUTING.md."""
    assert action.help and action.help.replace("%%", "%") in " ".join(run.ip.find_cell_magic("chat").__doc__.split())
    for option in action.option_strings:
        assert option in [found for _, _, found in completions(run, f"%%chat {option}")]


def test_completion(run, llm):
    run.ip.push({"conversation": 1})
    assert completions(run, "%%chat --te") == [(7, 11, "--temperature")]
    assert completions(run, "%chat --no") == [(6, 10, "--no-history"), (6, 10, "--no-stream")]
    assert completions(run, "%%chat --greedy -m f") == [(19, 20, "fake")]
    assert completions(run, "%%chat --format ") == [(16, 16, "json"), (16, 16, "markdown"), (16, 16, "text")]
    assert (10, 14, "conversation") in completions(run, "%%chat -o conv")
    assert completions(run, "%%chat --vars\nabout {conv") == [(21, 25, "conversation")]
    assert completions(run, "%chat --vars about {conv") == [(20, 24, "conversation")]
    assert completions(run, "x = %chat --te") == [(10, 14, "--temperature")]
    assert completions(run, "%%time\n%chat --te") == [(13, 17, "--temperature")]
    assert completions(run, "%%time\n%%chat --te") == [(14, 18, "--temperature")]
    assert completions(run, "for q in a:\n    x = %chat -m f") == [(29, 30, "fake")]
    assert completions(run, "%time %chat --te") == [(12, 16, "--temperature")]
    assert completions(run, "%chat_reset -m ") == [(15, 15, "fake")]
    assert completions(run, "%%chat --thinking o") == [(18, 19, "off"), (18, 19, "on")]
    assert "--temperature" not in str(completions(run, "%chat_reset --te"))
    assert "--temperature" not in str(completions(run, "%%time --te"))
    assert "--temperature" not in str(completions(run, "x = 5 %chat --te"))
    assert "--temperature" not in str(completions(run, "%%chat\nx --te"))


# Cost


def test_the_extension_is_light():
    """Under 0.1 s, and with neither torch nor transformers: a notebook's first cell is instant."""
    code = """if 1:
        import sys, time
        from IPython.terminal.interactiveshell import TerminalInteractiveShell
        shell = TerminalInteractiveShell.instance()
        start = time.process_time()
        shell.run_line_magic("load_ext", "chatmagic")
        assert shell.find_cell_magic("chat")
        assert not {"torch", "transformers", "httpx2", "markdown_it"} & set(sys.modules)
        print(time.process_time() - start)
    """
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(2)]
    assert min(float(run.stdout.split()[-1]) for run in runs) < 0.1


@pytest.mark.parametrize("options", ["", "--no-stream ", "--format json "])
def test_a_thought_is_apart_in_the_history_json_and_variables(run, llm, fake, options):
    def stream(messages, stats, **options):
        assert options["thinking"] is True and options["thinking_budget"] == 7
        yield from (Thought("Hm, "), Thought("yes."), "[1", "]")

    fake.stream = stream
    out = run(f"%%chat {options}--thinking on --thinking-budget 7 -o r\nhi")
    quoted, empty, *words = out.splitlines()
    assert (quoted, empty) == ("> Hm, yes.", "") and json.loads("".join(words)) == [1]
    reply = run.ip.user_ns["r"]
    assert (reply, reply.thinking, reply.json()) == ("[1]", "Hm, yes.", [1])
    assert llm.history == [("hi", "[1]")]
