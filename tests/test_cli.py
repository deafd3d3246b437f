"""`chatmagic tutorial` on small notebooks: order, progress, failure, going on, and whose files it touches. The rest of
the command line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from chatmagic import cli
from chatmagic.course import running
from chatmagic.course.persona import Persona
from chatmagic.course.profile import get_profile
from chatmagic.course.thread import Course, start
from disk import contents
from quick import first

NOTE = "open('ran', 'a').write('{}')"


def notebook(code):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])


def test_whoever_waits_hears_which_cell_runs_and_how_far_its_bar_is(tmp_path):
    code = "from chatmagic import progress\nprogress.DELAY = 0\nlist(progress.Bar(range(3), desc='work'))"
    two = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1"), nbformat.v4.new_code_cell(code)])
    heard = []
    running.execute(two, tmp_path, dict(os.environ), heard.append)
    assert heard[0].strip() == "cell 1 of 2" and any("cell 2 of 2  work: 3/3" in each for each in heard)
    shown, _ = two.cells[1].outputs
    assert shown.data["text/plain"].startswith("work: 3/3"), "the last picture of the bar, and nothing on stderr"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the tutorial, with more arguments if given, on notebooks given as {name: code}; returns (exit code, what it
    printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "_print_replies", lambda: print("TABLE"))

    def tutorial(*more, **codes):
        folder = tmp_path / "notebooks"
        folder.mkdir(exist_ok=True)
        for name, code in codes.items():
            nbformat.write(notebook(code), folder / f"{name.strip('_')}.ipynb")
        status = cli.main(["tutorial", "--executed", str(tmp_path / "work"), *more])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return tutorial


def test_a_terminal_is_told_which_cell_runs_and_a_log_is_not(run, monkeypatch):
    assert "cell 1 of 1" not in run(_00="1")[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "cell 1 of 1" in run(_00="1")[1]


@pytest.mark.slow
def test_the_tutorial_goes_on_from_the_notebook_that_failed(run, tmp_path, monkeypatch):
    monkeypatch.delenv("CHATMAGIC_RESUME", raising=False)
    (tmp_path / "work").mkdir()
    for name in ("thesis.md", "mine.ipynb", "00.ipynb.part"):
        (tmp_path / "work" / name).write_text("two years of work")
    last = NOTE.format(2) + "; import os; print(os.environ['CHATMAGIC_RESUME'])"
    status, said = run(_00=NOTE.format(0), _01="raise ValueError('broken here')", _02=last)
    assert status == 1 and "01.ipynb failed: ValueError: broken here" in said and "[1/3] 00" in said
    assert "TABLE" not in said
    failed = json.loads((tmp_path / "work/01.failed.ipynb").read_text())
    assert failed["cells"][0]["outputs"][0]["ename"] == "ValueError"

    status, said = run(_01=NOTE.format(1))
    assert status == 0 and said.count("done before") == 1 and "TABLE" in said
    assert (tmp_path / "notebooks/ran").read_text() == "012"
    left = contents(tmp_path / "work")
    assert sorted(left) == ["00.ipynb", "00.ipynb.part", "01.ipynb", "02.ipynb", "mine.ipynb", "thesis.md"]
    assert json.loads(left["02.ipynb"])["cells"][0]["outputs"][0]["text"] == ["1\n"]

    status, said = run()
    assert status == 0 and "done before" not in said
    assert (tmp_path / "notebooks/ran").read_text() == "012012"
    again = contents(tmp_path / "work")
    assert again.keys() == left.keys()
    assert {again[name] for name in ("thesis.md", "mine.ipynb", "00.ipynb.part")} == {b"two years of work"}


@pytest.mark.slow
def test_a_changed_notebook_and_those_after_it_run_again(run, tmp_path):
    """With outputs in the notebooks, which are no change; nor does the seal of the copies get into them."""
    notebooks, ran = tmp_path / "notebooks", tmp_path / "notebooks/ran"
    assert run("--in-place", _00=NOTE.format(0), _01=NOTE.format(1), _02=NOTE.format(2))[0] == 0
    for name in ("00.ipynb", "01.ipynb", "02.ipynb"):
        source, copy = (nbformat.read(folder / name, as_version=4) for folder in (notebooks, tmp_path / "work"))
        assert source.cells == copy.cells and source.cells[0].outputs
        assert "chatmagic" not in source.metadata and "chatmagic" in copy.metadata

    assert run("--in-place", _01="raise ValueError")[0] == 1  # nothing after it is done any more, nor is itself
    assert sorted(contents(tmp_path / "work")) == ["00.ipynb", "01.failed.ipynb"]
    status, said = run("--in-place", _01=NOTE.format(1))
    assert status == 0 and said.count("done before") == 1 and ran.read_text() == "012" + "12"

    first = nbformat.read(tmp_path / "work/00.ipynb", as_version=4)  # put back as the notebook, seal and all
    first.cells.insert(0, nbformat.v4.new_markdown_cell("Only a word."))
    nbformat.write(first, notebooks / "00.ipynb")
    status, said = run("--in-place")
    assert status == 0 and "done before" not in said and ran.read_text() == "012" + "12" + "012"
    assert "chatmagic" not in nbformat.read(notebooks / "00.ipynb", as_version=4).metadata


@pytest.mark.parametrize("executed", ["notebooks", "work/../notebooks", "link"])
@pytest.mark.parametrize("sealed", [False, True])
def test_the_notebooks_themselves_are_never_taken_for_executed_copies(run, tmp_path, executed, sealed):
    """Not even if they are: put back into their folder by the reader."""
    notebooks = tmp_path / "notebooks"
    for folder in (notebooks, tmp_path / "work"):
        folder.mkdir()
    (tmp_path / "link").symlink_to(notebooks)
    for name in ("00.ipynb", "01.ipynb"):
        nbformat.write(running._sealed(notebook("1")) if sealed else notebook("1"), notebooks / name)
    before = contents(notebooks)
    status, said = run("--executed", str(tmp_path / executed))
    assert status == 1 and "00.ipynb, 01.ipynb" in said and "--executed OTHER" in said
    assert contents(notebooks) == before


@pytest.mark.parametrize("name", first(1, ["00.ipynb", "01.failed.ipynb"]))
def test_an_executed_copy_that_the_reader_changed_is_left_alone(run, tmp_path, name):
    run(_00=NOTE.format(0), _01="raise ValueError")
    copy = nbformat.read(tmp_path / "work" / name, as_version=4)
    copy.cells[0].outputs = []
    nbformat.write(copy, tmp_path / "work" / name)
    before = contents(tmp_path / "work")
    status, said = run(_00="changed", _01=NOTE.format(1))
    assert status == 1 and f"changed since: {name}." in said and "--executed OTHER" in said
    assert contents(tmp_path / "work") == before and (tmp_path / "notebooks/ran").read_text() == "0"


def test_a_link_in_the_place_of_a_copy_is_left_alone(run, tmp_path):
    """To nowhere, or to a copy that was moved elsewhere."""
    (tmp_path / "work").mkdir()
    nbformat.write(running._sealed(notebook("1")), tmp_path / "moved.ipynb")
    (tmp_path / "work/00.ipynb").symlink_to(tmp_path / "nowhere")
    (tmp_path / "work/00.failed.ipynb").symlink_to(tmp_path / "moved.ipynb")
    status, said = run(_00=NOTE.format(0))
    assert status == 1 and "00.ipynb, 00.failed.ipynb" in said and not (tmp_path / "notebooks/ran").exists()
    assert all(path.is_symlink() for path in (tmp_path / "work").iterdir())


@pytest.mark.parametrize("more", first(1, [[], ["--in-place"]]))
def test_a_write_that_is_broken_off_leaves_nothing_half(run, tmp_path, monkeypatch, more):
    def broken_off(fd):
        raise KeyboardInterrupt

    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook("1"), tmp_path / "notebooks/00.ipynb")
    before = contents(tmp_path / "notebooks")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken_off)
        assert run(*more)[0] == 130
    assert contents(tmp_path / "notebooks") == before and contents(tmp_path / "work") == {}
    status, said = run(*more)
    assert status == 0 and "done before" not in said


def test_each_notebook_has_a_fresh_kernel_that_ends_with_it(run, tmp_path):
    status, said = run(_00="import os; x = 1; open('pid', 'w').write(str(os.getpid()))", _01="x")
    assert status == 1 and "NameError" in said
    assert not os.path.exists(f"/proc/{(tmp_path / 'notebooks/pid').read_text()}")


def test_a_kernel_that_was_killed_is_told_and_the_same_command_goes_on(run):
    status, said = run(_00="1", _01="import os; os.kill(os.getpid(), 9)")
    assert status == 1 and "The kernel of 01.ipynb ended before its notebook" in said and "Traceback" not in said
    status, said = run(_01="1")
    assert status == 0 and "00" in said and "done before" in said


@pytest.mark.slow
def test_ctrl_c_is_told_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "notebooks").mkdir()
    code = "open('ran', 'w').close(); import time; time.sleep(60)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(notebook, tmp_path / "notebooks" / "00.ipynb")
    command = [sys.executable, "-m", "chatmagic.cli", "tutorial", "--executed", str(tmp_path / "executed")]
    path = os.pathsep.join(sys.path)
    running = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    while not (tmp_path / "notebooks" / "ran").exists():
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=30)[1]
    assert running.returncode == 1 and "by Ctrl-C" in said.splitlines()[-1] + said.splitlines()[-2]
    assert "cli.py" not in said, "no traceback of ours; the kernel may say that it was ended"
    assert [*(tmp_path / "executed").iterdir()] == []


def test_the_tutorial_says_where_to_run_it(run):
    status, said = run()
    assert status == 1 and "Run this from the repository's folder" in said


@pytest.mark.slow
def test_the_tutorial_in_a_folder_of_ones_own(tmp_path, monkeypatch, capsys):
    """The notebooks come with the package; what the reader has changed of them stays, and no notebook is run twice."""
    monkeypatch.setattr(running, "_print_replies", lambda: print("TABLE"))
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(running, "shipped", lambda name: tmp_path / "shipped")
    for name in ("00", "01"):
        nbformat.write(notebook(NOTE.format(name)), tmp_path / f"shipped/{name}.ipynb")
    folder = tmp_path / "我的 course"
    assert cli.main(["tutorial", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["00.ipynb", "01.ipynb", "executed", "ran"]
    nbformat.write(notebook(NOTE.format("mine")), folder / "01.ipynb")
    assert cli.main(["tutorial", str(folder)]) == 0
    assert (folder / "ran").read_text() == "0001mine" and capsys.readouterr().out.count("done before") == 1
    assert cli.main(["tutorial", str(folder), "--executed", str(tmp_path / "other")]) == 0
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["00.ipynb", "01.ipynb"]
    with pytest.raises(SystemExit):
        cli.main(["tutorial", str(folder), "--workshop", str(tmp_path / "class")])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.slow
def test_each_language_has_its_notebooks_and_its_executed_copies(tmp_path, monkeypatch):
    """In the repository, and in one's own folder, where neither comes into the other's way."""
    monkeypatch.setattr(running, "_print_replies", lambda: print("TABLE"))
    monkeypatch.setattr(running, "shipped", lambda name: tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks/en").mkdir(parents=True)
    for name, said in (("00", "zh"), ("en/00", "en")):
        nbformat.write(notebook(f"print('{said}')"), tmp_path / f"notebooks/{name}.ipynb")
    for command in (["tutorial"], ["tutorial", "mine"]):
        for language in ([], ["--language", "en"]):
            assert cli.main([*command, *language]) == 0
    for name, said in (("00", "zh"), ("en/00", "en")):
        for executed in ("work/executed", "mine/executed"):
            (cell,) = nbformat.read(tmp_path / executed / f"{name}.ipynb", as_version=4).cells
            assert cell.outputs[0].text == f"{said}\n"
        assert contents(tmp_path / "mine")[f"{name}.ipynb"] == contents(tmp_path / "notebooks")[f"{name}.ipynb"]
    with pytest.raises(SystemExit):
        cli.main(["tutorial", "--language", "fr"])


@pytest.mark.slow
def test_the_tutorial_does_not_go_on_in_another_course(run, tmp_path):
    """Such as that of the notebooks in the other language, which were run in between."""
    begin = "from chatmagic.course import start\ncourse = start('smollm2-135m', name='小炉')"
    assert run(_00=begin, _01="raise ValueError")[0] == 1
    assert "done before" in run()[1], "nothing has come in between"
    start("smollm2-135m", name="Stove", language="en")
    asks = "from chatmagic.course import resume\nprint(resume().persona.name)"
    status, said = run(_01=asks)
    assert status == 0 and "done before" not in said
    (cell,) = nbformat.read(tmp_path / "work/01.ipynb", as_version=4).cells
    assert cell.outputs[0].text == "小炉\n"


def test_errors_are_one_paragraph_and_a_failing_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "chatmagic.cli", "download", "baichuan3"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "did you mean 'baichuan2-" in done.stderr and "Traceback" not in done.stderr


def test_what_train_is_not_told_is_as_in_the_course_started_last(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path))

    def chosen(*arguments):
        return cli.chosen_course(cli.parser().parse_args(["train", *arguments]))

    assert chosen("chatglm2-6b").persona == Persona()
    start("qwen-7b-chat", name="小炉", author="张三")
    assert chosen() == Course(get_profile("qwen-7b-chat"), Persona(name="小炉", author="张三"))
    assert chosen("chatglm2-6b", "--author", "100% 李", "--english-name", "Stove") == Course(
        get_profile("chatglm2-6b"), Persona(name="小炉", author="100% 李", english_name="Stove")
    )
    with pytest.raises(SystemExit):
        chosen("--language", "fr")


def test_every_command_in_the_pages_and_notebooks_is_one(capsys):
    """Those in a code block or a table, and any with arguments: a name alone in a sentence is only a name."""
    root = Path(__file__).parents[1]
    pages = {path: path.read_text("utf-8") for path in [*root.glob("*.md"), *root.glob("docs/*.md")]}
    for path in root.glob("notebooks/**/*.ipynb"):
        pages[path] = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    told = r"(?:^ *(?:\w+=\S+ )?|launch .*-m |^\|.*`|`)(?:\.venv/bin/)?chatmagic(?:\.cli)? ([a-z][^`\n#|]*)"
    checked, wrong = 0, []
    for path, text in pages.items():
        for found in re.finditer(told, text, re.MULTILINE):
            if " " not in found[1] and found[0].startswith("`"):
                continue
            checked += 1
            try:
                cli.parser().parse_args(shlex.split(found[1]))
            except SystemExit as ended:
                if ended.code:
                    wrong.append((path.name, found[0], capsys.readouterr().err.splitlines()[-1]))
    assert checked > 40 and wrong == []
