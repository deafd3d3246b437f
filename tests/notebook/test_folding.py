"""A thought in a notebook: folded and whole, its latest words while it grows, and apart from the words."""

import sys
from types import SimpleNamespace

import pytest

from chatmagic.conversation.pieces import Thought
from chatmagic.conversation.printing import Printer
from chatmagic.notebook import folding


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: (html, plain) of each display, and of each update after a mark."""
    shown = []

    def display(data, raw, display_id=False):
        shown.append(data)
        return SimpleNamespace(update=lambda data, raw: shown.append(data)) if display_id else None

    monkeypatch.setattr(folding, "display", display)
    return shown


def in_kernel(monkeypatch, watched):
    shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=watched))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def say(*pieces):
    with folding.Folding(Printer()) as printer:
        for piece in pieces:
            printer(piece)


def test_where_a_notebook_is_executed_a_thought_is_one_output(monkeypatch, shown, capsys):
    in_kernel(monkeypatch, watched=False)
    say(Thought("Hm,\n"), Thought("<b>\x1b "), "Hi", "!")
    assert capsys.readouterr().out == "Hi!\n" and len(shown) == 1
    html, plain = shown[0]["text/html"], shown[0]["text/plain"]
    assert html.startswith("<details><summary>thought, 8 characters</summary>") and html.endswith("</details>")
    assert "Hm,\n&lt;b&gt;␛" in html and "open" not in html.partition(">")[0] and plain == "> Hm,\n> <b>␛"


def test_a_person_sees_a_thought_grow(monkeypatch, shown, capsys):
    in_kernel(monkeypatch, watched=True)
    times = iter(range(100, 200))
    monkeypatch.setattr(folding, "monotonic", lambda: next(times))
    say(Thought("Hm, "), Thought("yes."), "Hi")
    heads = [data["text/html"].partition("</summary>")[0].partition("<summary>")[2] for data in shown]
    assert heads == ["thinking: Hm,", "thinking: Hm, yes.", "thought, 8 characters"]
    assert capsys.readouterr().out == "Hi\n"


def test_a_thought_that_is_all_and_one_that_was_stopped(monkeypatch, shown, capsys):
    in_kernel(monkeypatch, watched=False)
    say(Thought("Hm"))
    with pytest.raises(KeyboardInterrupt), folding.Folding(Printer()) as printer:
        printer(Thought("Well"))
        raise KeyboardInterrupt
    assert [data["text/plain"] for data in shown] == ["> Hm", "> Well"] and capsys.readouterr().out == ""
