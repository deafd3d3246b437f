"""`make`, where Python, pip and the package are stand-ins that note what they were asked.

Paths, interruptions and versions; what is made of it in earnest: tests/test_readme.py.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
# Answers -c as the real one of that version would, and makes an environment of itself.
echo "$*" >> "{log}"
case "$1" in
-c) case "$2" in *version_info*) exit {unfit};; *) exit 1;; esac;;
--version) echo "Python {version}";;
-m) case "$2" in
    venv) for last; do :; done; rm -rf "$last"; mkdir -p "$last/bin"; cp "$0" "$last/bin/python";;
    pip) if [ -e "{slow}" ]; then sleep 60; fi;;
    esac;;
esac
"""


@pytest.fixture(params=["plain", "带 blanks 的 'folder'"])
def folder(request, tmp_path):
    """A repository there, as far as make looks at it, and no git."""
    where = tmp_path / request.param
    where.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, where / name)
    return where


def python(tmp_path: Path, name: str = "python3", version: str = "3.12.1") -> Path:
    (tmp_path / "bin").mkdir(exist_ok=True)
    major, minor = map(int, version.split(".")[:2])
    unfit = int(not (3, 11) <= (major, minor) <= (3, 13))
    file = tmp_path / "bin" / name
    file.write_text(PYTHON.format(log=tmp_path / "log", slow=tmp_path / "slow", version=version, unfit=unfit))
    file.chmod(0o755)
    return file


def environment(tmp_path: Path) -> dict[str, str]:
    """With these Pythons and no other."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for tool in ("sh", "make", "cp", "rm", "mkdir", "touch", "grep", "sleep", "head", "id"):
        if not (tmp_path / "bin" / tool).exists():
            (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}


def make(tmp_path: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(tmp_path), capture_output=True, text=True)


def asked(tmp_path: Path) -> list[str]:
    """The steps that were taken, without what only looks."""
    lines = (tmp_path / "log").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("-m")]


def test_make_tutorial_builds_once_and_runs(tmp_path, folder):
    python(tmp_path)
    for _ in range(2):
        done = make(tmp_path, folder, "tutorial")
        assert done.returncode == 0, done.stderr
    steps = ["venv", "pip", "ipykernel", "chatmagic.cli", "ipykernel", "chatmagic.cli"]
    assert asked(tmp_path) == steps
    assert (folder / ".venv/.ready").exists() and (folder / ".venv/constraints.txt").exists()


def test_what_was_broken_off_is_begun_again(tmp_path, folder):
    """Ctrl-C while pip installs."""
    python(tmp_path)
    (tmp_path / "slow").touch()
    running = subprocess.Popen(
        ["make", "tutorial"],
        cwd=folder,
        env=environment(tmp_path),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists() or "pip" not in asked(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait() and not (folder / ".venv/.ready").exists()
    (tmp_path / "slow").unlink()
    assert make(tmp_path, folder, "tutorial").returncode == 0
    assert asked(tmp_path) == ["venv", "pip", "venv", "pip", "ipykernel", "chatmagic.cli"]


@pytest.mark.parametrize("version", ["2.7.18", "3.10.13", "3.14.0"])
def test_a_python_that_does_not_fit_is_told_which_does(tmp_path, folder, version):
    python(tmp_path, version=version)
    done = make(tmp_path, folder, "tutorial")
    said = done.stdout
    assert done.returncode and f"python3 is Python {version}; chatmagic runs on Python 3.11, 3.12 and 3.13." in said
    assert "None of them is here." in said and "conda env create -f environment.yml" in said
    python(tmp_path, "python3.13", "3.13.0")
    done = make(tmp_path, folder, "tutorial")
    assert done.returncode and "Type: make PYTHON=python3.13 tutorial" in done.stdout
    assert not (folder / ".venv").exists()
    done = make(tmp_path, folder, "PYTHON=python3", "LANGUAGE=en", "tutorial")
    assert "Type: make PYTHON=python3.13 LANGUAGE=en tutorial" in done.stdout
    assert make(tmp_path, folder, "PYTHON=python3.13", "tutorial").returncode == 0


def test_no_python_at_all(tmp_path, folder):
    done = make(tmp_path, folder, "tutorial")
    assert done.returncode and "None of them is here." in done.stdout


@pytest.mark.parametrize("goal", ["test", "quick", "lab", "docs", "notebooks"])
def test_the_other_commands_run_in_the_environment(tmp_path, folder, goal):
    python(tmp_path)
    done = make(tmp_path, folder, goal)
    assert done.returncode == 0, done.stderr
    last = {"test": "pytest", "quick": "pytest", "lab": "jupyterlab", "docs": "sphinx", "notebooks": "chatmagic.cli"}[
        goal
    ]
    assert asked(tmp_path)[-1] == last


@pytest.mark.parametrize("arguments, spoken", [([], "zh"), (["LANGUAGE=en"], "en")], ids=["by itself", "in English"])
def test_the_language_is_what_make_is_told_and_not_that_of_the_environment(tmp_path, folder, arguments, spoken):
    """LANGUAGE is gettext's, too: it says what the desktop speaks, such as de:en."""
    python(tmp_path)
    told = environment(tmp_path) | {"LANGUAGE": "de:en"}
    for goal in ("tutorial", "notebooks", "lab"):
        subprocess.run(["make", goal, *arguments], cwd=folder, env=told, check=True, capture_output=True)
    said = (tmp_path / "log").read_text()
    assert said.count(f"chatmagic.cli tutorial --language {spoken}") == 2
    first = {"zh": "notebooks/00-setup.ipynb", "en": "notebooks/en/00-setup.ipynb"}[spoken]
    assert f"/lab/tree/{first}\n" in said


@pytest.mark.parametrize("version, fits", [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_what_make_asks_of_a_python(version, fits):
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("FITS := ")]
    code = line.removeprefix("FITS := ").replace("import sys; ", f"import sys; sys.version_info = {(*version, 0)}; ")
    assert (subprocess.run([sys.executable, "-c", code]).returncode == 0) == fits
