"""The house stands as docs/architecture.md draws it: one room a concern, imports downstairs, one format."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "chatmagic"
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
DOC = (ROOT / "docs" / "architecture.md").read_text("utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


@pytest.mark.parametrize(
    "command", [("-c", LINT_IMPORTS), ("-m", "ruff", "check"), ("-m", "ruff", "format", "--check")]
)
def test_the_linters_are_content(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imports(file: Path) -> list[str]:
    """The modules that a file imports from anywhere in it, absolute."""
    package, found = ["chatmagic", *file.relative_to(PACKAGE).parts[:-1]], []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            found.append(".".join([*above, *filter(None, [node.module])]))
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def drawn(arrow: str) -> set[tuple[str, str]]:
    """The arrows of that kind in the picture."""
    lines = re.findall(rf"^ +(\w+) {re.escape(arrow)} (.+)$", DOC, re.MULTILINE)
    return {(start, end) for start, ends in lines for end in ends.split(" & ")}


def test_the_picture_is_of_the_real_imports():
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in files}
    assert set(re.findall(r"^\| `(\w+)` \|", DOC, re.MULTILINE)) == rooms
    pairs = [
        (file.relative_to(PACKAGE).parts[0].removesuffix(".py"), room(module))
        for file in files
        for module in imports(file)
        if module.startswith("chatmagic.")
    ]
    real = {(start, end) for start, end in pairs if start != end and end != "errors"}
    upward = {tuple(map(room, each.split(" -> "))) for each in CONTRACTS[0]["ignore_imports"]}
    assert drawn("-->") == real - upward
    assert drawn("-.->") == upward


def test_the_contracts_name_every_package_that_is_not_pythons_own():
    """Or one that is new could be imported where none may be."""
    found = {module.split(".")[0] for file in PACKAGE.rglob("*.py") for module in imports(file)}
    others = found - sys.stdlib_module_names - {"chatmagic"}
    assert set(CONTRACTS[1]["forbidden_modules"]) == others
    assert others - set(CONTRACTS[2]["forbidden_modules"]) == {"IPython", "markdown_it", "traitlets"}


def test_the_notebooks_import_from_two_places():
    cells = [cell for path in NOTEBOOKS for cell in json.loads(path.read_text("utf-8"))["cells"]]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = re.findall(r"^\s*(?:from|import) (chatmagic[\w.]*)", code, re.MULTILINE)
    assert set(found) == {"chatmagic", "chatmagic.course"}
