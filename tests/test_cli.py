"""`chatmagic tutorial` on small notebooks: order, progress, failure, going on. The rest of the command line."""

import json
import os
import subprocess
import sys

import nbformat
import pytest

from chatmagic import cli
from chatmagic.course import Course, start
from chatmagic.persona import Persona
from chatmagic.profiles import get_profile


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the tutorial on notebooks given as {name: code}; returns (exit code, what it printed)."""
    monkeypatch.setattr(cli, "_print_before_after", lambda: print("TABLE"))

    def tutorial(**codes):
        folder = tmp_path / "notebooks"
        folder.mkdir(exist_ok=True)
        for name, code in codes.items():
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
            nbformat.write(notebook, folder / f"{name.strip('_')}.ipynb")
        status = cli.main(["tutorial", "--notebooks", str(folder), "--executed", str(tmp_path / "work")])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return tutorial


def test_the_tutorial_goes_on_from_the_notebook_that_failed(run, tmp_path):
    note = "open('ran', 'a').write('{}')"
    status, said = run(_00=note.format(0), _01="raise ValueError('broken here')", _02=note.format(2))
    assert status == 1 and "01.ipynb failed: ValueError: broken here" in said and "[1/3] 00" in said
    assert "TABLE" not in said
    failed = json.loads((tmp_path / "work/01.failed.ipynb").read_text())
    assert failed["cells"][0]["outputs"][0]["ename"] == "ValueError"

    status, said = run(_01=note.format(1))
    assert status == 0 and "done before" in said and "TABLE" in said
    assert (tmp_path / "notebooks/ran").read_text() == "012"
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["00.ipynb", "01.ipynb", "02.ipynb"]

    status, said = run()
    assert status == 0 and "done before" not in said
    assert (tmp_path / "notebooks/ran").read_text() == "012012"


def test_each_notebook_has_a_fresh_kernel_that_ends_with_it(run, tmp_path):
    status, said = run(_00="import os; x = 1; open('pid', 'w').write(str(os.getpid()))", _01="x")
    assert status == 1 and "NameError" in said
    assert not os.path.exists(f"/proc/{(tmp_path / 'notebooks/pid').read_text()}")


def test_the_tutorial_says_where_to_run_it(run):
    status, said = run()
    assert status == 1 and "Run this from the repository's folder" in said


def test_errors_are_one_paragraph_and_a_failing_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "chatmagic.cli", "download", "baichuan3"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "nearest is 'baichuan2-" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "text, columns, shown",
    [("你是谁", 8, "你是谁  "), ("a b\n c", 6, "a b c "), ("你是谁呀", 6, "你是…"), ("abcdef", 4, "abc…"), ("ab", 2, "ab")],
)
def test_a_table_cell_fits_its_columns(text, columns, shown):
    assert cli.fit(text, columns).rstrip() == shown.rstrip() and cli._columns(cli.fit(text, columns)) in (columns, columns - 1)


def test_what_train_is_not_told_is_as_in_the_course_started_last(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path))

    def chosen(*arguments):
        return cli.chosen(cli.parser().parse_args(["train", *arguments]))

    assert chosen("chatglm2-6b").persona == Persona()
    start("qwen-7b-chat", name="小炉", author="张三")
    assert chosen() == Course(get_profile("qwen-7b-chat"), Persona(name="小炉", author="张三"))
    assert chosen("chatglm2-6b", "--author", "100%", "--english-name", "Stove") == Course(
        get_profile("chatglm2-6b"), Persona(name="小炉", author="100%", english_name="Stove")
    )
    with pytest.raises(SystemExit):
        chosen("--language", "fr")
