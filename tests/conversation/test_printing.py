"""How a reply reaches the reader's eyes: as it comes where somebody sits, in one output where nobody does."""

import sys
from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper
from types import SimpleNamespace

import pytest

from chatmagic import ChatLLM
from chatmagic.conversation import printing
from chatmagic.conversation.pieces import AllThought, Notice, Thought
from fake_model import FakeModel


@pytest.fixture
def in_kernel(monkeypatch):
    def set_up(allow_stdin):
        shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=allow_stdin))
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))

    return set_up


def say(text, failure=None):
    """What is written and flushed, in turn, a flush being None; and what was raised."""
    model = FakeModel()
    model.reply, model.failure = lambda turn, question: text, failure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatmagic.conversation.llm.register", lambda llm: None)  # it would look for a whole IPython
        llm = ChatLLM(model, max_new_tokens=10**6)
    calls, raised = [], None
    with redirect_stdout(
        SimpleNamespace(write=lambda text: text and calls.append(text), flush=lambda: calls.append(None))
    ):
        try:
            llm("?")
        except BaseException as error:
            raised = error
    return calls, raised


def test_a_terminal_and_a_pipe_see_every_piece_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    written, _ = say("abc")
    assert written == ["a", None, "b", None, "c", None, "\n"]


def test_quick_pieces_are_not_a_message_each(in_kernel, monkeypatch):
    """A kernel's flush is a message, and a Jupyter server drops those beyond 1,000 a second."""
    in_kernel(allow_stdin=True)
    now = [100.0]

    def clock():
        now[0] += 0.001
        return now[0]

    monkeypatch.setattr(printing, "monotonic", clock)
    written, _ = say("x" * 1000)
    assert "".join(filter(None, written)) == "x" * 1000 + "\n"
    assert 15 <= written.count(None) <= 21  # a second of pieces, a flush each 0.05 s


def test_slow_pieces_come_one_by_one_in_a_kernel(in_kernel, monkeypatch):
    in_kernel(allow_stdin=True)
    times = iter(range(100, 200))
    monkeypatch.setattr(printing, "monotonic", lambda: next(times))
    written, _ = say("ab")
    assert written == ["a", None, "b", None, "\n"]


def test_where_a_notebook_is_executed_a_reply_is_one_write(in_kernel):
    in_kernel(allow_stdin=False)
    written, _ = say("a\x1bbc")
    assert written == ["a␛bc\n"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("CUDA error")])
@pytest.mark.parametrize("watched", [True, False])
def test_what_there_is_is_shown_before_a_failure(in_kernel, watched, failure):
    in_kernel(allow_stdin=watched)
    written, raised = say("abcdef", failure)
    assert isinstance(raised, type(failure))
    assert "".join(filter(None, written)) == "abc\n"


def test_nothing_said_prints_that_alone(in_kernel):
    for watched in (True, False):
        in_kernel(allow_stdin=watched)
        written, _ = say("")
    assert written == ["[the reply is empty, and is not remembered]\n"]


THOUGHTS = {
    "told": ([Thought("Hm,"), Thought("\nyes"), "Hi"], "> Hm,\n> yes\n\nHi\n"),
    "told by its end": (["Hm", AllThought(), "Hi"], "Hm\n[what stands above was a thought]\n\nHi\n"),
    "and nothing else": ([Thought("Hm"), Notice("[cut]\n")], "> Hm[cut]\n"),
}


@pytest.mark.parametrize("pieces, shown", THOUGHTS.values(), ids=THOUGHTS)
@pytest.mark.parametrize("watched", [True, False])
def test_a_thought_is_told_from_what_is_said(in_kernel, capsys, watched, pieces, shown):
    in_kernel(allow_stdin=watched)
    with printing.Printer() as printer:
        for piece in pieces:
            printer(piece)
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
def test_a_console_that_is_not_utf8_loses_no_reply(monkeypatch, encoding):
    monkeypatch.setitem(sys.modules, "IPython", None)
    model = FakeModel()
    model.reply = lambda turn, question: "a你🙂"
    llm, out = ChatLLM(model), TextIOWrapper(BytesIO(), encoding)
    with redirect_stdout(out):
        llm("?")
        printing.say("🙂")
    out.seek(0)
    hidden = {"gbk": "a你\\U0001f642\n"}.get(encoding, "a\\u4f60\\U0001f642\n")
    assert out.read() == hidden + "\\U0001f642\n" and llm.history == [("?", "a你🙂")]


def test_what_turns_the_direction_of_writing_is_shown_and_not_obeyed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", None)
    model = FakeModel()
    model.reply = lambda turn, question: "a\u202eb\x1b[2J\u2066"
    assert ChatLLM(model)("?") == "a\u202eb\x1b[2J\u2066"
    assert capsys.readouterr().out == "a<U+202E>b␛[2J<U+2066>\n"
