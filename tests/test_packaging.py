"""What is declared is what is imported, what is imported lazily stays so, and the wheel is whole."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def distribution(requirement: str) -> str:
    """The normalised name in a requirement (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def imported_distributions() -> dict[str, set[str]]:
    """Every distribution that a file of the package imports from, with the files' names."""
    homes, found = packages_distributions(), {}
    for file in (ROOT / "chatmagic").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for name in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"chatmagic"}:
                found.setdefault(distribution(homes.get(name, [name])[0]), set()).add(file.name)
    return found


# Who imports what an extra brings.
READS = {
    "data": {"tables.py"},
    "serve": {"app.py", "protocol.py"},
    "web": {"cli.py", "web.py"},
    "gguf": {"gguf.py"},
    "export": {"gguf.py"},
}


def test_every_import_is_declared_and_every_declaration_is_imported():
    """Triton comes with torch where that has CUDA, and not elsewhere: decode.py asks for kernels.py and does without.
    ipykernel is what runs notebooks, and not imported."""
    declared = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    extras = {distribution(each): files for extra, files in READS.items() for each in EXTRAS[extra]}
    imported = imported_distributions()
    assert {name: files for name, files in imported.items() if name not in declared | extras.keys()} == {
        "triton": {"kernels.py"}
    }
    assert {name for name, files in extras.items() if not imported.get(name, set()) or imported[name] - files} == set()
    assert declared - imported.keys() == {"ipykernel"}
    assert {"torch", "ipython", "markdown-it-py"} <= imported.keys()


def test_environment_yml_says_what_pyproject_says():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip == {"pip": [*PROJECT["dependencies"], *EXTRAS["lab"], *EXTRAS["docs"], *EXTRAS["test"], "-e ."]}


@pytest.mark.parametrize("module", ["chatmagic", "chatmagic.notebook.magic", "chatmagic.course"])
def test_importing_loads_neither_torch_nor_transformers(module):
    script = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    assert module in loaded.stdout.split()
    assert not {"torch", "transformers", "peft", "numpy"} & set(loaded.stdout.split())


def test_the_wheel_holds_every_module_and_the_profiles(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("chatmagic-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("chatmagic/")}
    files = [path for path in (ROOT / "chatmagic").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    ours = {path.relative_to(ROOT).as_posix() for path in files}
    beside = [ROOT / "constraints.txt", *(ROOT / "notebooks").rglob("*.ipynb")]
    assert held == ours | {f"chatmagic/{path.relative_to(ROOT).as_posix()}" for path in beside}
    assert {
        "chatmagic/course/profiles.toml",
        "chatmagic/py.typed",  # mypy and editors trust the annotations
        "chatmagic/training/__init__.py",
        "chatmagic/models/families/__init__.py",
    } <= held
