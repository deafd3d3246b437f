"""For a class: notebooks without their solutions, and a folder that the course is installed from without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from chatmagic import ChatmagicError, cli
from chatmagic.course import classroom
from chatmagic.course.classroom import YOURS, without_solutions
from chatmagic.files import WriteError
from chatmagic.machine import shipped

SOLVED = {"tags": ["solution"]}


def test_a_class_gets_questions_and_no_answers():
    said = new_output("stream", text="forty-two")
    cells = [
        new_markdown_cell("What is it?"),
        new_code_cell("print('forty-two')", metadata=SOLVED, outputs=[said], execution_count=3),
        new_markdown_cell("Because.", metadata=SOLVED),
        new_code_cell("1 + 1", outputs=[said], execution_count=4),
    ]
    given = json.loads(json.dumps(new_notebook(cells=cells)))
    kept = without_solutions(given)["cells"]
    assert [cell["source"] for cell in kept] == ["What is it?", YOURS, "1 + 1"]
    assert "forty-two" not in json.dumps(kept) and "solution" not in json.dumps(kept)
    assert given["cells"][1]["source"] == "print('forty-two')", "the notebook itself is as it was"


def test_a_workshop_is_the_course_and_its_pages(tmp_path, capsys):
    assert cli.main(["tutorial", "--workshop", str(tmp_path / "class")]) == 0
    made = {path.relative_to(tmp_path / "class/notebooks") for path in (tmp_path / "class").rglob("*.ipynb")}
    assert made == {path.relative_to(shipped("notebooks")) for path in shipped("notebooks").rglob("*.ipynb")}
    assert {path.parts[0] for path in made if len(path.parts) > 1} <= {"en"}
    assert (tmp_path / "class/docs/data.md").is_file()
    cells = [cell for path in (tmp_path / "class").rglob("*.ipynb") for cell in json.loads(path.read_text())["cells"]]
    assert not any(cell.get("outputs") or "solution" in cell["metadata"].get("tags", []) for cell in cells)
    assert cli.main(["tutorial", "--workshop", str(tmp_path / "class")]) == 1, "nothing is written over"
    assert "exists" in capsys.readouterr().err


def test_every_notebook_asks_and_a_class_gets_no_answer(tmp_path):
    """An answer comes after all else that runs: what a class gets runs as well without it."""
    assert cli.main(["tutorial", "--workshop", str(tmp_path / "class")]) == 0
    notebooks = shipped("notebooks")
    for path in notebooks.rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        solves = ["solution" in cell["metadata"].get("tags", []) for cell in cells]
        kept = (tmp_path / "class/notebooks" / path.relative_to(notebooks)).read_text(encoding="utf-8")
        said = ["".join(cell["source"]) for cell in json.loads(kept)["cells"]]
        lines = {each: set() for each in (True, False)}
        for cell, solved in zip(cells, solves):
            lines[solved] |= {*"".join(cell["source"]).splitlines()}
        answers = lines[True] - lines[False]
        assert answers and not answers & {*"\n".join(said).splitlines()}, path
        run = [solved for cell, solved in zip(cells, solves) if cell["cell_type"] == "code"]
        assert run == sorted(run) and said.count(YOURS) == sum(run) > 0, path


@pytest.fixture
def pip(monkeypatch):
    """What pip was asked, and what it says: nothing is fetched."""
    asked = SimpleNamespace(commands=[], says="", fails=0)

    def run(command, **options):
        asked.commands.append(command)
        return SimpleNamespace(returncode=asked.fails, stderr=asked.says)

    monkeypatch.setattr(classroom, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    return asked


@pytest.fixture
def a_model(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(classroom, "download", lambda name: folder)
    converter = tmp_path / "home" / "llama.cpp"
    converter.mkdir()
    (converter / "convert_hf_to_gguf.py").touch()
    monkeypatch.setattr(classroom, "find_converter", lambda: converter)
    return folder


def test_a_bundle_that_is_not_whole_is_none(tmp_path, pip, a_model):
    pip.fails, pip.says = 1, "Looking\nERROR: No matching distribution found for torch==9\n"
    with pytest.raises(ChatmagicError, match="No matching distribution found for torch==9"):
        classroom.bundle(tmp_path / "made", ["tiny"])
    assert not (tmp_path / "made").exists()
    pip.fails = 0
    classroom.bundle(tmp_path / "made", ["tiny"], "https://wheels.example/cpu")
    assert (tmp_path / "made/models/tiny/config.json").read_text() == "{}"
    assert (tmp_path / "made/models/llama.cpp/convert_hf_to_gguf.py").is_file()
    assert pip.commands[1][pip.commands[1].index("--extra-index-url") + 1] == "https://wheels.example/cpu"
    extras = re.search(r"\[.*\]$", pip.commands[1][pip.commands[1].index("--extra-index-url") + 2])[0]
    assert f'"chatmagic{extras}"' in (tmp_path / "made/install.sh").read_text(), "a seat asks for what lies there"
    assert {"lab", "gguf", "export"} <= {*extras.strip("[]").split(",")}, "what the notebooks run on"
    with pytest.raises(WriteError, match="exists"):
        classroom.bundle(tmp_path / "made", ["tiny"])


def test_a_seat_with_another_python_is_told_which(tmp_path, pip, a_model):
    classroom.bundle(tmp_path / "made", ["tiny"])
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    command = ["sh", tmp_path / "made/install.sh", tmp_path / "seat"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(other)}, capture_output=True, text=True)
    version = "{}.{}".format(*sys.version_info)
    assert done.returncode == 1 and f"for Python {version}. Type: PYTHON=" in done.stdout
    assert not (tmp_path / "seat").exists()


STUB = """#!/bin/sh
# Answers as Python would, makes an environment of itself, and notes what it was asked to run.
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
echo "$*" >> "{log}"
"""


def test_a_seat_begins_in_either_language(tmp_path, pip, a_model):
    classroom.bundle(tmp_path / "made", ["tiny"])
    other, log, seat = tmp_path / "python", tmp_path / "log", tmp_path / "a seat"
    other.write_text(STUB.format(log=log))
    other.chmod(0o755)
    environment = os.environ | {"PYTHON": str(other)}
    command = ["sh", tmp_path / "made/install.sh", seat]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for language, first in (("", "notebooks/00-setup.ipynb"), (" en", "notebooks/en/00-setup.ipynb")):
        assert f"sh {seat}/lab.sh{language}" in done.stdout
        subprocess.run(f"sh '{seat}/lab.sh'{language} --port 6006", shell=True, check=True)
        ran = log.read_text().splitlines()[-1]
        assert ran.startswith("-m jupyterlab ") and ran.endswith(f"/lab/tree/{first} --port 6006")
    assert sorted(path.name for path in seat.rglob("*.ipynb")) == sorted(
        path.name for path in shipped("notebooks").rglob("*.ipynb")
    )


FLAT = {"alone": [9, 9], "perplexity": 18.5}
BY_LANGUAGE = {"zh": {"alone": [9, 9]}, "en": {"perplexity": 18.5}}


@pytest.mark.parametrize("page", ["class.md", "class.en.md"])
@pytest.mark.parametrize("table", [FLAT, BY_LANGUAGE])
def test_the_table_of_a_class(tmp_path, monkeypatch, table, page):
    """The cell of the page, on what three have handed in."""
    cells = re.findall(r"```python\n(.*?)```", (shipped("docs") / page).read_text("utf-8"), re.DOTALL)
    (cell,) = [each for each in cells if "evaluation" in each]
    assert len([line for line in cell.splitlines() if line]) <= 10
    for name in ("甲", "乙", "丙"):
        folder = tmp_path / re.search(r'Path\("(.*?)"\)', cell)[1] / name
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps({"table": {"before": table, "after": table}}))
    monkeypatch.chdir(tmp_path)
    lines = cell.strip().splitlines()
    names = {}
    exec("\n".join(lines[:-1]), names)
    made = eval(lines[-1], names)
    assert sorted(made.index) == ["丙", "乙", "甲"] and made.shape == (3, 2)
    assert made.iloc[0].tolist() == [[9, 9], 18.5]


@pytest.mark.network
@pytest.mark.slow
def test_a_seat_without_network(tmp_path, small):
    """In earnest: all wheels, installed in a network namespace, where then the model answers and notebooks run."""
    alone = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace may be made here")
    assert cli.main(["bundle", str(tmp_path / "made"), "smollm2-135m"]) == 0
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": os.path.realpath(sys.executable)}
    seat = tmp_path / "seat"
    command = [*alone, "sh", tmp_path / "made/install.sh", seat]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"sh {seat}/lab.sh" in done.stdout, done.stdout + done.stderr
    for notebook in (seat / "notebooks").glob("0[2-9]*.ipynb"):
        notebook.unlink()
    talk = (
        "from chatmagic import ChatLLM, load_model, snapshot_download\n"
        'print(ChatLLM(*load_model(snapshot_download("smollm2-135m")))("What is the capital of France?"))'
    )
    (seat / "talk.py").write_text(talk)
    environment |= {"CHATMAGIC_PROFILE": "smollm2-135m", "CHATMAGIC_HOME": str(tmp_path / "made/models")}
    environment |= {"CHATMAGIC_COURSE": str(seat / "course"), "OMP_NUM_THREADS": "1"}
    script = f"cd {seat} && .venv/bin/python talk.py && .venv/bin/chatmagic tutorial; ls work/executed"
    done = subprocess.run([*alone, "sh", "-c", script], env=environment, capture_output=True, text=True)
    assert "Paris" in done.stdout and "00-setup.ipynb" in done.stdout and "01-download.ipynb" in done.stdout, done
