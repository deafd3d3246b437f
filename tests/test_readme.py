"""Every command that the READMEs show is run here, in a copy of the repository; their pictures and links exist.

The notebooks come first in `make test`, so that here the course is run already: `make tutorial` goes on from a late
notebook, as after a failure.
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from chatmagic.course import running

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.en.md")
BLOCK = re.compile(r"```bash\n(.*?)```", re.S)


def commands(readme: str) -> list[str]:
    return [line for block in BLOCK.findall((ROOT / readme).read_text(encoding="utf-8")) for line in block.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What git would give a newcomer, with the environment that these tests run in as its `.venv`."""
    if Path(sys.prefix).name != ".venv":
        pytest.skip("run by another environment than `make test` makes")
    copy = tmp_path_factory.mktemp("clone") / "chatmagic"
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("the repository came without git, which knows what a newcomer gets")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(sys.prefix)
    if subprocess.run(["make", "--question", ".venv/.ready"], cwd=copy).returncode:
        pytest.skip("make would build .venv anew, and through the link empty the one that these tests run in")
    return copy


def run(command: str, folder: Path, **more) -> str:
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path}, **more
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_both_readmes_show_the_same_commands_and_all_are_run_here():
    """The English one its own notebooks'."""
    in_english = {command: f"{command} LANGUAGE=en" for command in ("make tutorial", "make lab")}
    assert [in_english.get(command, command) for command in commands(READMES[0])] == commands(READMES[1])
    assert sorted(commands(READMES[0])) == sorted(
        [
            "make tutorial",
            "make test",
            "make lab",
            "pip install .",
            'pip install --no-deps . && pip install ipython markdown-it-py "httpx2[socks]"',  # test_without_torch.py
            "chatmagic doctor",
            "chatmagic download smollm2-135m",
        ]
    )


@pytest.mark.network
@pytest.mark.slow
def test_make_tutorial(clone, tmp_path, monkeypatch):
    """From 06 on, as after a failure there: nbval ran the notebooks before these tests, and they take minutes."""
    monkeypatch.delenv("CHATMAGIC_COURSE")  # nbval ran them in the user's own
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))  # whose kernel is not to be one of a clone that goes
    executed = clone / "work" / "executed"
    executed.mkdir(parents=True)
    *notebooks, export, own = sorted((clone / "notebooks").glob("0*.ipynb"))
    export.unlink()
    own.unlink()
    for notebook in notebooks[:-1]:
        sealed = nbformat.writes(running._sealed(nbformat.read(notebook, as_version=4)))
        (executed / notebook.name).write_text(sealed + "\n", encoding="utf-8")
    printed = run("make tutorial", clone)
    assert (
        f"[{len(notebooks)}/{len(notebooks)}] {notebooks[-1].stem}" in printed
        and "question" in printed
        and "我叫梦中情炉" in printed
    )
    assert len(list(executed.glob("*.ipynb"))) == len(notebooks)


@pytest.mark.network
@pytest.mark.slow
def test_make_tutorial_in_english(clone, tmp_path, monkeypatch):
    """The second notebook as if the first were done, and no more of them, for the time that they take."""
    monkeypatch.delenv("CHATMAGIC_COURSE")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    setup, download, *rest = sorted((clone / "notebooks" / "en").glob("0*.ipynb"))
    for notebook in rest:
        notebook.unlink()
    executed = clone / "work" / "executed" / "en"
    executed.mkdir(parents=True)
    (executed / setup.name).write_text(nbformat.writes(running._sealed(nbformat.read(setup, as_version=4))), "utf-8")
    printed = run("make tutorial LANGUAGE=en", clone)
    assert "[1/2] 00-setup             done before" in printed and "[2/2] 01-download" in printed
    copy = nbformat.read(executed / download.name, as_version=4)
    assert copy.cells[0].source.startswith("# 01 · Download") and any(cell.get("outputs") for cell in copy.cells)


def test_make_test_is_what_runs_these_tests(clone):
    planned = run("make --dry-run test", clone)
    assert re.search(r"pytest --nbval-lax .* notebooks/\*\.ipynb\n.*pytest .* tests\n", planned)


@pytest.mark.slow
@pytest.mark.parametrize("command, first", [("make lab", "notebooks"), ("make lab LANGUAGE=en", "notebooks/en")])
def test_make_lab(clone, tmp_path, command, first):
    environment = os.environ | {
        "JUPYTER_RUNTIME_DIR": str(tmp_path),
        "JUPYTER_DATA_DIR": str(tmp_path),
        "BROWSER": "true",
    }
    with (tmp_path / "log").open("w+") as file:
        lab = subprocess.Popen(
            command.split(), cwd=clone, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 60
            while f"/lab/tree/{first}/00-setup.ipynb?token=" not in (tmp_path / "log").read_text():
                assert lab.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
            log = (tmp_path / "log").read_text()
        finally:
            os.killpg(lab.pid, signal.SIGTERM)
            lab.wait()
    assert f"Serving notebooks from local directory: {clone}\n" in log, "links of notebooks to ../docs open"
    spec = json.loads((tmp_path / "kernels" / "chatmagic" / "kernel.json").read_text())
    assert spec["env"] == {"OMP_WAIT_POLICY": "PASSIVE"}, "as chatmagic.machine.share_cores sets it"


@pytest.mark.network
@pytest.mark.slow
def test_pip_install_alone_gives_a_working_import(clone, tmp_path):
    """The dependencies are those of this environment, offered through a path, so that only the package is installed."""
    run(f"python -m venv --system-site-packages {tmp_path / 'new'}", clone)
    pip = tmp_path / "new" / "bin" / "python"
    run(f"{pip} -m pip install --quiet --no-deps .", clone)
    site = next((Path(sys.prefix) / "lib").glob("python*/site-packages"))
    code = (
        "import chatmagic; print(chatmagic.__file__, len(chatmagic.build_messages('你好')), chatmagic.ChatLLM.__name__)"
    )
    done = subprocess.run(
        [pip, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(site)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "new")) and done.stdout.endswith(" 1 ChatLLM\n")


@pytest.mark.parametrize(
    "command, expected", [("doctor", "fits this machine"), ("download smollm2-135m", "smollm2-135m")]
)
def test_the_command_line(clone, small, command, expected):
    assert expected in run(f"chatmagic {command}", clone)


@pytest.mark.parametrize("readme", READMES)
def test_pictures_and_links_exist(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert len(targets) > 10
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert [target for target in targets if target not in anchors and not (ROOT / target).exists()] == []
    if readme == "README.en.md":
        twins = [re.sub(r"^notebooks/", "notebooks/en/", target.replace(".md", ".en.md")) for target in targets]
        led = [target for target, twin in zip(targets, twins) if target != twin and (ROOT / twin).exists()]
        assert set(led) == {"README.md"}, "to an English page, where there is one"


def test_the_training_curve_is_the_one_in_the_notebook():
    """And not one of an earlier run."""
    cells = nbformat.read(ROOT / "notebooks" / "04-train-adalora.ipynb", as_version=4).cells
    outputs = [output for cell in cells if "keras_model.fit(" in cell.source for output in cell.get("outputs", [])]
    (curve,) = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert base64.b64decode(curve) == (ROOT / "docs" / "images" / "training.png").read_bytes()
