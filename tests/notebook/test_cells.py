"""Cells as people write them: what reaches the model of them, and what is refused in words."""

import time

import numpy as np
import pandas as pd
import pytest

from chatmagic import ChatmagicError
from chatmagic.notebook.cells import MOST, fill

# Questions


@pytest.mark.parametrize(
    "question",
    [
        "你是谁?",
        "你是谁??",
        "What is Python?",
        "what's up?",
        "a.b?",
        "%ls?",
        "print?",
        "x*?",
        "(what?",
        "x = y?",
    ],
)
def test_a_question_mark_at_the_end_is_the_questions(run, llm, fake, question):
    """IPython takes `NAME?` at the end of a line for a call for help, and the cell succeeds with nothing sent."""
    asked = lambda: fake.asked[-1][0][-1]["content"].strip()  # noqa: E731
    for cell in (f"%chat {question}", f"x = %chat {question}", f"%%chat {question}", f"%%chat\n{question}"):
        fake.asked.clear(), llm.reset()
        run(cell)
        assert asked() == question and run.ip.user_ns.get("x") in (
            None,
            f"1: {question}",
        )
    fake.asked.clear()
    if not set("('") & set(question):  # %time itself fails there, of an apostrophe from Python 3.12 on
        run(f"%time y = %chat {question}")
        assert asked() == question


IN_CODE = """
for word in 'ab':
    answer = %chat who?
    if word == 'b':
        %chat really?
s = '''
%chat no?
'''
"""
IN_A_FUNCTION = """
word = 'outer'
def ask(word, n):
    y = [n]
    reply = %chat --vars {word} {y[0] + 1} {[word for _ in y]}
    return reply
said = ask('inner', 2)
"""


@pytest.mark.parametrize(
    "cell, sent",
    [
        ("for i in range(2): %chat really?", 2),
        ("x = ''\nx += %chat really?", 1),
        ("a = 1; %chat really?", 1),
        ("if (n := 1): x = %chat really?", 1),
        ("for i in range(10 % 4): %chat really?", 2),
        ("def f():\n    return %chat really?\nf()", 1),
        ("x = '' or %chat really?", 1),
        ("x = 10 % 3; y = %chat really?", 1),
    ],
)
def test_wherever_a_question_stands_in_code_it_is_no_help(run, llm, fake, cell, sent):
    run(cell)
    assert [messages[-1]["content"] for messages, _ in fake.asked] == ["really?"] * sent


@pytest.mark.parametrize("cell", ["chat = 3\nx = 10 %chat", "x = 7 % 4", "x = f'{1} %chat a?'\ny = [10 % 4]"])
def test_what_only_divides_stays_as_it_is(run, llm, fake, cell):
    run(cell)
    assert fake.asked == []


def test_questions_in_code(run, llm, fake):
    run(IN_CODE)
    assert [messages[-1]["content"] for messages, _ in fake.asked] == ["who?", "who?", "really?"]
    assert run.ip.user_ns["s"] == "\n%chat no?\n"
    run("replies = {}\nreplies['a'] = %chat and now?")
    assert run.ip.user_ns["replies"] == {"a": "4: and now?"}


@pytest.mark.parametrize("line", ["%chat?", "%%chat?", "%chat??", "%chat_history?"])
def test_help_stays_help(run, llm, fake, line):
    run(line)
    assert fake.asked == []


def test_a_cell_in_a_terminal_goes_on_until_an_empty_line(run):
    """IPython asks the transforms whether a cell is complete; `%%chat` alone is not."""
    complete = run.ip.input_transformer_manager.check_complete
    assert complete("%%chat")[0] == complete("%%chat\nhi")[0] == "incomplete"
    assert complete("%%chat\nhi\n\n")[0] == "complete"


# Cells


GREETS = [
    "# my note\n%%chat\n你好",
    "#| echo: false\n#| label: fig\n\n%%chat\n你好",
    "\n\n# a\n\n  # b\n%%chat\n你好\n",
    "%%chat\u3000\n你好",
    "%%chat\t\n你好",
    "%%chat \t \n你好",
    "%%chat\r\n你好\r\n",
    "\ufeff%%chat\n你好",
    "\u200b%%chat\u200b\n你好",
    "%%chat 你好",
    "%%chat\u3000你好",
    "%%chat\t你好\n",
    "%chat\u3000你好",
    "%chat\t你好",
    "%chat \u3000 你好",
    "x = %chat\u3000你好",
    "%time %chat\u3000你好",
    "%%time\n%%chat\n你好",
    "%%time\n# a note\n%%chat\n你好",
]
SAYS = {
    "%%chat\r\none\r\n\r\ntwo\r\n": "one\n\ntwo",
    "%%chat\n\n    def f():\n\n        return 1\n\n": "    def f():\n\n        return 1",
    "%%chat --greedy Translate this:  \n# a title\n  text": "Translate this:\n# a title\n  text",
    **{f"%%chat\n{text}": text for text in ("—— 他说", "– he said", "—dash", "- item")},
}


@pytest.mark.parametrize("cell, text", [*((cell, "你好") for cell in GREETS), *SAYS.items()])
def test_however_it_is_written(run, llm, fake, cell, text):
    run(cell)
    assert fake.asked[-1][0] == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "line, system",
    [
        ('--system "be brief"', "be brief"),
        ("--system 'what''s \"this\"'", "what''s \"this\""),
        (r'--system "say \"hi\" to all"', 'say "hi" to all'),
        (r"--system 'it\'s me'", "it's me"),
        ("--system=“You are a pirate.”", "You are a pirate."),
        ("--system ‘You’re a pirate.’", "You’re a pirate."),
        ("--system ”You are“", "You are"),
        ("--system 「你是海盗」", "你是海盗"),
        ("--system You are a pirate.", "You are a pirate."),
        ("--system 你是 海盗", "你是 海盗"),
        ("--system You are a well-known pirate - really --greedy", "You are a well-known pirate - really"),
        ("--system You are a pirate --seed=3", "You are a pirate"),
        ("--greedy --system brief", "brief"),
        ('--system ""', ""),
    ],
)
def test_a_system_text_quoted_or_not(run, llm, fake, line, system):
    run(f"%%chat {line}\n你好")
    messages, options = fake.asked[-1]
    assert messages == [{"role": "system", "content": system}, {"role": "user", "content": "你好"}]
    assert ("greedy" in options) == ("--greedy" in line) and ("seed" in options) == ("--seed" in line)


def test_on_a_questions_own_line(run, llm, fake):
    for line in (
        "--system brief -- who are you",
        "--system be very brief --greedy who are you",
        '--system "b" who are you',
    ):
        run(f"%chat {line}")
        assert fake.asked[-1][0][-1]["content"] == "who are you"
        assert fake.asked[-1][0][0]["content"] == line.split("--system ")[1].split(" --")[0].split(" who")[0].strip('"')
    for line in ("%chat --system You are a pirate. Hello", "%%chat --system brief What is this?\n"):
        run.fails(line, "--system of several words goes into quotes")


# Variables


def test_expressions(run, llm, fake):
    run("import datetime\nd = {'k': [1, 2]}\nx = 3\nname = '小明'")
    run("%%chat --vars\n{name}{name!r:>6} {d['k'][0]} {x + 1} {x != 2} {'a' if x else 'b'} {[x for _ in d]} {x or {}}")
    assert fake.asked[-1][0][-1]["content"] == "小明  '小明' 1 4 True a [3] 3"
    run(
        r"%%chat --vars"
        "\n"
        r"""{'\n'.join('ab')} {x:{x}d}| {name[0:1]} {datetime.date(2026, 1, 2):%d.%m.%Y} {"}"} {{x}}"""
    )
    assert fake.asked[-1][0][-1]["content"] == "a\nb   3| 小 02.01.2026 } {x}"


def test_a_functions_own_variables(run, llm, fake):
    run(IN_A_FUNCTION)
    assert run.ip.user_ns["said"] == "1: inner 3 ['inner']"


def test_tables_and_arrays_arrive_whole():
    table = pd.DataFrame({"城市": [f"c{n}" for n in range(100)], **{f"column{n}": n for n in range(12)}})
    assert "..." in str(table)
    text = fill("{table}", {"table": table})
    assert all(word in text for word in ["c50", "column6"]) and "..." not in text and len(text.splitlines()) == 101
    assert fill("{s}", {"s": table["城市"]}).count("\n") >= 99
    assert fill("{a}", {"a": np.arange(2000)}).split()[1001] == "1000"
    torch = pytest.importorskip("torch")
    assert fill("{t}", {"t": torch.arange(2000)}).split(", ")[1000] == "1000"
    assert fill("{t}", {"t": table.head(1)}) == table.head(1).to_string()


@pytest.mark.parametrize("name", ["table", "array", "wide"])
def test_or_are_refused_by_their_size(run, llm, fake, name):
    values = {
        "table": pd.DataFrame({"a": range(10**6)}),
        "array": np.zeros((200, 200)),
        "wide": pd.Series(["x" * MOST]),
    }
    run.ip.push(values)
    run.fails(
        "%%chat --vars\nlook: {" + name + "}", f"{{{name}}} is a", "20,000 characters go whole", f"{{{name}[:20]}}"
    )
    assert fake.asked == []


@pytest.mark.parametrize(
    "text, words",
    [
        ("{nmae}", ["no variable 'nmae'", "did you mean 'name'?"]),
        ("def f() {", ["no expression in '{'", "{{ and }}"]),
        ("a } b", ["no expression in '} b'"]),
        ("{}", ["no expression in '{}'"]),
        ("{name.size}", ["{name.size}: AttributeError", "no attribute 'size'"]),
        ("{name:.2f}", ["Unknown format code 'f'"]),
        ("{1/0}", ["{1/0}: ZeroDivisionError"]),
        ('{"a": 1}', ["{{ and }}"]),
    ],
)
def test_variables_that_are_not_there(text, words):
    with pytest.raises(ChatmagicError) as refused:
        fill(text, {"name": "小明"})
    assert all(word in str(refused.value) for word in ["--vars: ", *words])


def test_a_long_paste_is_refused_soon(run, llm):
    began = time.process_time()
    run.fails("%%chat --vars\n" + "{ a, [}, " * 5000, "no expression")
    assert time.process_time() - began < 3


# Line magics


@pytest.mark.parametrize("magic", ["chat_history", "chat_reset", "chat_models"])
def test_every_line_magic_knows_its_model_and_refuses_what_it_does_not_know(run, llm, fake, magic):
    from chatmagic import ChatLLM
    from fake_model import FakeModel

    llm.history = [("q", "a")]
    other = ChatLLM(FakeModel(), name="other", history=[("question", "answer")])
    run.fails(f"%{magic} --modle fake", "unknown option --modle", "did you mean '--model'?", f"%{magic}? lists")
    run.fails(f"%{magic} fake", "'fake'")
    run.fails(f"%{magic} -m othr", "no model is called 'othr'; did you mean 'other'?")
    assert (llm.history, other.history) == ([("q", "a")], [("question", "answer")])
    printed = run(f"%{magic} -m fake")
    assert "other" not in printed and "question  answer" not in printed
    assert len(llm.history) == (magic != "chat_reset") and other.history == [("question", "answer")]
