"""What people asked for: once more, take back, keep what there was, files with a question, errors explained, code."""

import gc
import re
from types import SimpleNamespace

import pytest

from chatmagic import ChatLLM
from chatmagic.conversation.llm import Interrupted
from chatmagic.conversation.registry import registered
from fake_model import FakeModel


def asked(fake):
    """The last messages, as their contents."""
    return [message["content"] for message in fake.asked[-1][0]]


@pytest.fixture
def next_cell(run, monkeypatch):
    """What was put into the next cell."""
    cells = []
    monkeypatch.setattr(run.ip, "set_next_input", lambda text, replace=False: cells.append(text))
    return cells


# Once more


def test_retry_replaces_the_last_answer(run, llm, fake):
    run("%%chat\na"), run("%%chat --system pirate --seed 1 -o r\nb")
    fake.reply = lambda turn, question: f"again {question}"
    assert run("%chat_retry --seed 2 --stats").startswith("again b\n[")
    assert asked(fake) == ["pirate", "a", "1: a", "b"] and fake.asked[-1][1]["seed"] == 2
    assert llm.history == [("a", "1: a"), ("b", "again b")] and run.ip.user_ns["r"] == "again b"
    run("%chat_retry")
    assert len(llm.history) == 2 and fake.asked[-1][1]["seed"] == 2


@pytest.mark.parametrize("option", ["", "--new", "--round 1", "--no-history"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("no")])
def test_retry_of_a_question_that_failed(run, llm, fake, option, failure):
    run("%%chat\na"), run("%%chat\nb")
    before = llm.history
    fake.failure = failure
    assert not run.ip.run_cell(f"%%chat {option}\nb").success and llm.history == before
    fake.failure = RuntimeError("and again")
    assert not run.ip.run_cell("%chat_retry").success and llm.history == before
    run("%chat_retry")
    expected = {"": [*before, ("b", "3: b")], "--no-history": before}.get(option, [("b", "1: b")])
    assert llm.history == expected


def test_retry_after_other_ways_of_asking(run, llm, fake):
    run.fails("%chat_retry", "no question to ask again")
    run.ip.push({"llm": llm})
    run("%%chat --system s\na"), run("llm('b', stream=False)"), run("%chat_retry")
    assert asked(fake) == ["a", "1: a", "b"] and len(llm.history) == 2
    run("%chat_history undo"), run("%chat_retry")
    assert [query for query, _ in llm.history] == ["a", "b"]
    run("llm.history = [('x', 'y')]\nllm.asked = None"), run("%chat_retry")
    assert llm.history == [("x", "1: x")]
    run.fails("%chat_retry what", "'what'")
    run.fails("%chat_retry --sede 1", "--seed")


def test_a_round_is_asked_anew(run, llm, fake):
    for word in "abc":
        run(f"%%chat\n{word}")
    run("%%chat --round 2\nB")
    assert llm.history == [("a", "1: a"), ("B", "2: B")]
    for number in (0, 3, -1):
        run.fails(f"%%chat --round {number}\nx", f"no round {number}", "has 2")
    fake.failure = KeyboardInterrupt()
    run.fails("%%chat --round 1\nx", "as it was before", kind=Interrupted)
    assert len(llm.history) == 2


def test_undo_and_edit(run, llm, fake, next_cell):
    for word in "abcd":
        run(f"%%chat\n{word}")
    run("%chat_history edit 2")
    assert next_cell == ["%%chat --round 2\nb"] and len(llm.history) == 4
    run(next_cell[0].replace("\nb", "\nB"))
    assert llm.history == [("a", "1: a"), ("B", "2: B")]
    run("%chat_history -m fake edit")
    assert next_cell[1] == '%%chat -m "fake" --round 2\nB'
    run.fails("%chat_history undo 3", "from 1 to 2, not 3")
    assert run("%chat_history undo 2") == "round  tokens  question  reply\n" and llm.history == []


# What there was


def test_a_stopped_reply_is_kept_on_request(run, llm, fake):
    run("%%chat\na")
    assert llm.partial is None
    fake.failure = KeyboardInterrupt()
    run.fails("%%chat\nb", "stopped by you", kind=Interrupted)
    assert llm.partial == "2: " and llm.partial.query == "b" and llm.history == [("a", "1: a")]
    run("%chat_history keep")
    assert llm.history == [("a", "1: a"), ("b", "2: ")] and llm.partial is None
    run.fails("%chat_history keep", "no part of a reply")
    fake.failure = KeyboardInterrupt()
    run.fails("%%chat --new\nc", kind=Interrupted)
    run("%chat_history keep")
    assert llm.history == [("c", "1: ")]
    fake.failure = KeyboardInterrupt()
    run.fails("%%chat\nd", kind=Interrupted)
    run("%%chat\ne")
    assert llm.partial is None


# Files


def test_files_and_outputs_go_with_a_question(run, llm, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("\ufeff# 标题\n```py\nx\n```\n", "utf-8")
    (tmp_path / "gbk.txt").write_bytes("中文".encode("gbk"))
    assert run("%%chat --no-stream --file a.md --file gbk.txt\nsum up") == (
        "1: a.md:\n\n````\n# 标题\n```py\nx\n```\n````\n\ngbk.txt:\n\n```\n中文\n```\n\nsum up\n"
        "[a.md: 17 characters]\n[gbk.txt: 2 characters]\n"
    )
    run.ip.run_cell("print('printed')\n1 + 1", store_history=True)
    number = run.ip.execution_count - 1
    run(f"%%chat --file Out[{number}]\nwhy?")
    assert "printed\n2" in asked(fake)[-1] and asked(fake)[-1].startswith(f"Out[{number}]:\n\n```")
    run("%chat_retry")
    assert asked(fake)[-1].count("printed") == 1


@pytest.mark.parametrize(
    "name, words",
    [
        ("b.md", ["b.md cannot be read: No such file", "beside it lies a.md"]),
        ("no/where/b.md", ["cannot be read"]),
        (".", ["cannot be read", "directory"]),
        ("picture.png", ["is no text in UTF-8 or GB 18030"]),
        ("Out[99999]", ["the cell [99999] has no output"]),
    ],
)
def test_what_cannot_be_read_is_not_sent(run, llm, fake, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    run.fails(f"%%chat --file {name}\nhi", *words)
    if not name.startswith("Out"):
        run.fails(f"%%chat --system @{name}\nhi", *words)
    assert fake.asked == []


def test_a_system_text_from_a_file(run, llm, fake, tmp_path):
    (tmp_path / "my pirate.txt").write_text("Be a pirate.\nAlways.\n")
    run(f"%%chat --system '@{tmp_path}/my pirate.txt'\nhi")
    assert asked(fake) == ["Be a pirate.\nAlways.", "hi"]


# Errors and code


def test_the_last_error_is_explained(run, llm, fake):
    run.fails("%chat_explain", "no cell has failed")
    run.ip.run_cell("def half(x):\n    return x / 0\n\nhalf(3)")
    run.fails("%chat_history load nowhere", "nowhere")  # says itself what to do
    run("%chat_explain --no-stream")
    (sent,) = asked(fake)
    assert "half(3)\n```" in sent and "return x / 0" in sent and "ZeroDivisionError: division by zero" in sent
    assert "interactiveshell" not in sent and sent.endswith("这个单元格出错了。说明原因，并给出改好的代码。")
    run.ip.run_cell("x = = 1")
    run("%chat_explain Why, in English?")
    assert (
        "x = = 1\n" in asked(fake)[-1]
        and "SyntaxError" in asked(fake)[-1]
        and asked(fake)[-1].endswith("Why, in English?")
    )
    run.ip.run_cell("def f(n):\n    return g(n - 1) if n else {}['k']\ndef g(n):\n    return f(n - 1)\nf(60)")
    run("%chat_explain")
    assert len(re.findall("in [fg]\\b", asked(fake)[-1])) < 10 and "KeyError: 'k'" in asked(fake)[-1]


@pytest.mark.parametrize("before, question", [("Hello", "Say why"), ("Who is 小炉?", "说明原因"), ("你好", "说明原因")])
def test_it_is_asked_about_in_the_language_that_is_spoken(run, llm, fake, before, question):
    run(f"%%chat --new\n{before}")
    run.ip.run_cell("1 / 0")
    run("%chat_explain")
    assert question in asked(fake)[-1]


def test_an_error_from_before_the_model_was_there(ipython, run, llm, fake):
    ipython.extension_manager.unload_extension("chatmagic")
    ipython.run_cell("early = 1 / 0")
    ipython.extension_manager.load_extension("chatmagic")
    run("%chat_explain")
    assert "early = 1 / 0" in asked(fake)[-1] and "ZeroDivisionError" in asked(fake)[-1]


@pytest.mark.parametrize(
    "reply, code",
    [
        ("So:\n```python\nx = 1\n```\nand\n```\ny = 2\n```\n", "x = 1\n\ny = 2"),
        ("```py\nprint('a\u202eb')\n```", "print('a<U+202E>b')"),
        ("~~~\nx\n~~~ ", "x"),
        ("1.\n   ````python\n   ```\n   ````", "   ```"),
        ("```bash\nls\n```", None),
        ("x = 1", None),
    ],
)
def test_code_goes_into_the_next_cell(run, llm, fake, next_cell, reply, code):
    fake.reply = lambda turn, question: reply
    printed = run("%%chat --code\nwrite")
    assert next_cell == ([] if code is None else [code]) and ("no Python code" in printed) == (code is None)
    assert "x" not in run.ip.user_ns


# Conversations outside the kernel


def test_export(run, llm, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llm.system = "be brief"
    fake.reply = lambda turn, question: {"a\n\nb": "**c** ![x](http://evil)", "code": "```py\nx = 1"}[question]
    run("%%chat\na\n\nb"), run("%%chat\ncode")
    run("%chat_history export talk.md")
    text = (
        "# Conversation with fake\n\n> be brief\n\n## 1\n\n> a\n>\n> b\n\n**c** \\![x](http://evil)\n\n"
        "## 2\n\n> code\n\n```py\nx = 1\n```\n"
    )
    assert (tmp_path / "talk.md").read_text("utf-8") == text
    run("%chat_history undo"), run("%chat_history export talk.md")
    assert (tmp_path / "talk.md").read_text("utf-8") == text.partition("\n## 2")[0]
    (tmp_path / "mine.md").write_text("# Mine")
    run.fails("%chat_history export mine.md", "holds something else", "name another file")
    assert (tmp_path / "mine.md").read_text() == "# Mine"


@pytest.fixture
def notebook(run, monkeypatch):
    """The shell as the kernel of a notebook, in JupyterLab; called, it is a kernel that starts anew."""
    monkeypatch.setattr(run.ip, "kernel", SimpleNamespace(_allow_stdin=True), raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "chat.ipynb")

    def restart():
        run.ip.reset()
        gc.collect()
        registered.clear()
        run.ip.extension_manager.unload_extension("chatmagic")
        run.ip.extension_manager.load_extension("chatmagic")
        run.ip.push({"ChatLLM": ChatLLM, "FakeModel": FakeModel})
        return run("llm = ChatLLM(FakeModel(name='a/b'))")

    return restart


def test_a_restarted_kernel_offers_the_conversation(run, notebook):
    assert notebook() == ""
    run("%%chat\na"), run("llm('b', stream=False)")
    offer = "[a/b: 2 rounds from before are kept; %chat_history load brings them back]\n"
    assert notebook() == offer and notebook() == offer  # it was not taken up
    run("%%chat\nnew")  # does not cost the old
    run("%chat_history load")
    assert run.ip.user_ns["llm"].history == [("a", "1: a"), ("b", "2: b")]
    run("%%chat\nc")
    assert "3 rounds" in notebook()
    run("%%chat\nd"), run("%chat_reset")
    assert "3 rounds" in notebook()


@pytest.mark.parametrize("off", ["config", "executed", "no name", "terminal"])
def test_where_nothing_is_kept(run, notebook, monkeypatch, off, tmp_path):
    notebook()
    if off == "config":
        run("%config ChatMagics.autosave = False")
    elif off == "executed":
        run.ip.kernel._allow_stdin = False
    elif off == "no name":
        monkeypatch.delenv("JPY_SESSION_NAME")
    else:
        monkeypatch.delattr(run.ip, "kernel")
        monkeypatch.delenv("JPY_SESSION_NAME")
    run("%%chat\na")
    assert list((tmp_path / "home").rglob("*.jsonl")) == []


def test_a_folder_that_is_closed_fails_no_cell(run, notebook, tmp_path):
    (tmp_path / "home").write_text("a file, where the folder must be")
    assert notebook() == "" and run("%%chat\na") == "1: a\n"
