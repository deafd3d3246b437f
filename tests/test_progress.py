"""Bars: an output of the cell in a kernel, a line in a terminal, and nothing for what is done at once."""

import io
import re
from types import SimpleNamespace

import IPython
import pytest

from chatmagic import progress
from chatmagic.progress import Bar


@pytest.fixture
def kernel(monkeypatch):
    """What a kernel would show, one list of pictures a bar."""
    shown = []

    class Handle:
        def __init__(self, data):
            self.pictures = [data]
            shown.append(self.pictures)

        def update(self, data, metadata, raw):
            assert raw and metadata == progress.MARK
            self.pictures.append(data)

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr("IPython.display.display", lambda data, metadata, raw, display_id: Handle(data))
    return shown


def work(seconds, clock, monkeypatch, **options):
    """A bar over ten pieces of work that take so long each."""
    monkeypatch.setattr(Bar, "_time", staticmethod(lambda: clock[0]), raising=False)
    with Bar(desc="work", total=10, **options) as bar:
        bar._time, bar.start_t, bar.last_print_t = (lambda: clock[0]), clock[0], clock[0]
        for _ in range(10):
            clock[0] += seconds
            bar.update()


def test_in_a_kernel_a_bar_is_an_output_that_says_the_time_left(kernel, capsys, monkeypatch):
    work(2, [100.0], monkeypatch)
    (pictures,) = kernel
    assert "work: 20% 2/10 [00:04, 00:16 left" in pictures[1]["text/plain"]
    assert pictures[-1]["text/plain"] == "work: 10/10 [00:20]"
    assert all(data["text/plain"] in data["text/html"] for data in pictures), "what the colour says the text says too"
    assert "width:20%" in pictures[1]["text/html"] and "width:100%" in pictures[-1]["text/html"]
    assert capsys.readouterr() == ("", ""), "nothing on stderr, which JupyterLab paints as an alarm"


def test_what_is_done_at_once_needs_no_bar(kernel, monkeypatch):
    work(0.01, [100.0], monkeypatch)
    assert kernel == []


def test_in_a_terminal_it_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr(progress, "in_kernel", lambda: False)
    out = io.StringIO()
    work(2, [100.0], monkeypatch, file=out, mininterval=0)
    assert re.search(r"work: +20%.*2/10 \[00:04<00:16", out.getvalue())


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "in_kernel", lambda: False)
    work(10, [100.0], monkeypatch)
    assert re.findall(r"(\d+)/10", capsys.readouterr().err) == ["3", "6", "9", "10"], "each half minute, and the end"


def test_the_models_bars_are_ours(model, tokenizer, tmp_path, kernel, capsys, monkeypatch):
    from chatmagic import load_model

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(progress, "DELAY", 0)
    load_model(tmp_path)
    assert [pictures[-1]["text/plain"].split(":")[0] for pictures in kernel] == ["Loading weights"]
    assert "Loading" not in capsys.readouterr().err
