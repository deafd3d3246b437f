"""A broken `%%chat` cell fails those who run notebooks: nbval and `jupyter nbconvert --execute`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

pytestmark = pytest.mark.slow
SETUP = "from fake_model import FakeModel\nfrom chatmagic import ChatLLM\nllm = ChatLLM(FakeModel())"
TESTS = Path(__file__).parents[1]


def write(path, cells):
    """A notebook of (source, what was printed when it was saved); no outputs where that is empty."""
    notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}})
    for source, text in cells:
        outputs = [new_output("stream", name="stdout", text=text)] if text else []
        notebook.cells.append(new_code_cell(source, outputs=outputs, execution_count=1))
    nbformat.write(notebook, path)


def execute(*command):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS / "helpers"), str(TESTS.parent)])}
    command = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


GOOD = {
    "streamed": ("%%chat\n你好", "1: 你好\n"),
    "whole": ("%%chat --no-stream --greedy\n你好", "1: 你好\n"),
}
BROKEN = {
    "another reply": ("%%chat\n你好", "1: 您好\n"),
    "misspelt option": ("%%chat --temprature 1\n你好", ""),
    "empty cell": ("%%chat", ""),
    "blank cell": ("%%chat --greedy\n\n", ""),
    "not json": ("%%chat --format json\n你好", ""),
    "failing model": ("llm.model.failure = OSError()\nget_ipython().run_cell_magic('chat', '', '你好')", ""),
    "interrupted": (
        "llm.model.failure = KeyboardInterrupt()\nget_ipython().run_cell_magic('chat', '', '你好')",
        "",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every notebook's cells by nbval, in one run: {name: [outcome of the first cell, of the second]}."""
    folder = tmp_path_factory.mktemp("notebooks")
    for name, cell in (GOOD | BROKEN).items():
        write(folder / f"{name.replace(' ', '_')}.ipynb", [(SETUP, ""), cell])
    write(folder / "no_model.ipynb", [("%load_ext chatmagic", ""), ("%%chat\n你好", "")])
    report = execute("pytest", "--nbval", "-rA", "-p", "no:cacheprovider", "-c", os.devnull, folder).stdout
    found = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED|XFAIL|ERROR) \S*?(\w+)\.ipynb::Cell", report, re.MULTILINE):
        found.setdefault(name.replace("_", " "), []).append(outcome)
    assert found, report
    return found


@pytest.mark.parametrize("name", GOOD)
def test_nbval_compares_what_was_said(outcomes, name):
    assert outcomes[name] == ["PASSED", "PASSED"]


@pytest.mark.parametrize("name", [*BROKEN, "no model"])
def test_nbval_fails_a_broken_cell(outcomes, name):
    assert outcomes[name] == ["PASSED", "FAILED"]


def test_one_reply_is_one_output_where_a_notebook_is_executed(tmp_path):
    """nbclient, under nbconvert, papermill and Quarto, stores each message of a cell as an output of its own."""
    cells = [f"%%chat{option}\n{'long ' * 60}" for option in ("", " --stats", " --no-stream", " --format markdown")]
    write(tmp_path / "long.ipynb", [(f"{SETUP}\nllm.backend.delay = 0.002", ""), *((cell, "") for cell in cells)])
    done = execute("nbconvert", "--execute", "--to", "notebook", "--inplace", tmp_path / "long.ipynb")
    assert done.returncode == 0, done.stderr
    _, *said = nbformat.read(tmp_path / "long.ipynb", as_version=4).cells
    assert [len(cell.outputs) for cell in said] == [1, 1, 1, 1]
    assert said[0].outputs[0].text == f"1: {('long ' * 60)}\n"


def test_nbconvert_executes_and_stops_at_a_broken_cell(tmp_path):
    say = "llm.model.reply = lambda turn, question: question"
    text = "%%chat --format markdown\n**hi** <script>alert(1)</script> ![x](http://evil/x.png)"
    write(tmp_path / "good.ipynb", [(SETUP, ""), (say, ""), (text, "")])
    write(tmp_path / "bad.ipynb", [(SETUP, ""), ("%%chat -m nobody\nhi", "")])
    good = execute("nbconvert", "--execute", "--to", "html", tmp_path / "good.ipynb")
    assert good.returncode == 0, good.stderr
    page = (tmp_path / "good.html").read_text("utf-8")
    assert "<p><strong>hi</strong> &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert '<a href="http://evil/x.png">x</a>' in page and 'src="http://evil' not in page
    bad = execute("nbconvert", "--execute", "--to", "html", tmp_path / "bad.ipynb")
    assert bad.returncode != 0 and "no model is called 'nobody'" in bad.stderr
