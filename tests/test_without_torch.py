"""Messages, prompts, the magics and servers where there is no torch: in an environment that has what the README's line
installs, what that needs, and nothing else."""

import json
import re
import subprocess
import sys
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fake_server import running

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"^pip install --no-deps \. && pip install (.+)$", re.MULTILINE)
CODE = """
import sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
import chatmagic
from chatmagic import build_messages, build_prompt, connect, validate_messages

messages = build_messages("hi", [("q", "a")], system="s")
validate_messages(messages)
for model_type in ("qwen-7b-chat", "baichuan2-chat", "chatglm2"):
    print(build_prompt(messages, model_type).count("hi"))
shell.run_line_magic("load_ext", "chatmagic")
llm = connect(sys.argv[1], "parrot")
shell.run_cell_magic("chat", "", "hello")
print(llm.history)
llm.save("talk.jsonl")
for name in ("torch", "transformers", "numpy", "requests", "tqdm"):
    assert name not in sys.modules
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is here")
"""


def closure(names: list[str]) -> set[str]:
    """The distributions of these names and all that they need on this machine."""
    found, asked = set(), [(Requirement(name).name, Requirement(name).extras) for name in names]
    while asked:
        name, extras = asked.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if (key, *sorted(extras)) in found:
            continue
        found.add((key, *sorted(extras)))
        for needed in map(Requirement, requires(name) or ()):
            if any(not needed.marker or needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                asked.append((needed.name, needed.extras))
    return {key for key, *_ in found}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the packages of the README's line, linked from this environment's."""
    (names,) = LINE.findall((ROOT / "README.md").read_text("utf-8"))
    folder = tmp_path_factory.mktemp("site")
    for name in closure(re.findall(r"[\w.\[\]-]+", names)):
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(distribution(name).locate_file(top))
    (folder / "chatmagic").symlink_to(ROOT / "chatmagic")
    return folder


def test_both_readmes_have_the_line():
    assert LINE.findall((ROOT / "README.md").read_text("utf-8")) == LINE.findall(
        (ROOT / "README.en.md").read_text("utf-8")
    )


@pytest.mark.parametrize("readme", ["README.md", "README.en.md"])
def test_the_readmes_cell_for_a_server(site, tmp_path, readme):
    """As it stands there, but for the address and the name of a server of this machine."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.DOTALL)
    (cell,) = [block for block in blocks if "connect(" in block]
    with running() as server:
        cell = re.sub(r'connect\("[^"]+", "[^"]+"\)', f'connect("{server.url}", "parrot")', cell)
        done = plainly(
            site,
            tmp_path,
            f"""
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
shell.run_cell({cell!r}).raise_error()
shell.run_cell_magic("chat", "", "hello")
""",
        )
    assert done.returncode == 0 and "你好!" in done.stdout, done.stdout + done.stderr


def plainly(site, folder, code, *arguments):
    """Run by a Python that has the packages of the line and no others."""
    command = [sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{code}", *arguments]
    environment = {"HOME": str(folder), "IPYTHONDIR": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_messages_prompts_magics_and_servers(site, tmp_path):
    assert not {"torch", "transformers", "numpy"} & {path.name for path in site.iterdir()}
    with running() as server:
        done = plainly(site, tmp_path, CODE, server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("1\n1\n1\n") and "你好!" in done.stdout
    assert json.loads((tmp_path / "talk.jsonl").read_text().splitlines()[0])
