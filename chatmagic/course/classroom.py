"""What a teacher prepares: notebooks without answers, and the whole course in a folder for rooms without network."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ChatmagicError
from ..files import make_folder, new_folder, write
from ..machine import GB, shipped, short
from .converter import find_converter
from .download import download

YOURS = "# 写在这里 your answer\n"


def without_solutions(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook as a class gets it: no outputs, and a cell that is tagged `solution` is empty, or gone if it is
    text."""

    def solves(cell: dict[str, Any]) -> bool:
        return "solution" in cell["metadata"].get("tags", [])

    cells = [dict(cell) for cell in notebook["cells"] if cell["cell_type"] == "code" or not solves(cell)]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
            cell |= {"source": YOURS, "metadata": {}} if solves(cell) else {}
    return notebook | {"cells": cells}


def workshop(folder: Path) -> None:
    """Write the notebooks in both languages, without solutions and outputs, and the pages that they lead to, into the
    new `folder`. Raises WriteError where it exists."""
    with new_folder(folder) as staging:
        place(staging, without_solutions)


def place(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the notebooks, each changed so, into `folder`, and the repository's pages beside them."""
    notebooks, pages = shipped("notebooks"), shipped("docs")
    for path in sorted(notebooks.rglob("*.ipynb")):
        target = folder / "notebooks" / path.relative_to(notebooks)
        make_folder(target.parent)
        changed = change(json.loads(path.read_text(encoding="utf-8")))
        write(target, json.dumps(changed, ensure_ascii=False, indent=1) + "\n")
    make_folder(folder / "docs")
    for path in sorted(pages.glob("*.md")):  # a wheel brings none
        write(folder / "docs" / path.name, path.read_bytes())


def bundle(folder: Path, models: Sequence[str], index: str | None = None) -> None:
    """Fill the new `folder` with what a seat without network needs: wheels for this Python and this kind of machine,
    models, notebooks, pages, and install.sh. index: where pip looks besides. Raises ChatmagicError outside of the
    repository and where pip fails, WriteError where the folder exists or the disk is too small, and as `download`
    does."""
    source = Path(__file__).parents[2]
    if not (source / "pyproject.toml").is_file():
        raise ChatmagicError("A bundle is made in the repository: clone it, `make kernel`, and there: the same.")
    found = [*map(download, models), find_converter()]  # which notebook 07 asks for
    with new_folder(folder, needed=sum(map(bytes_below, found)) + 2 * GB) as staging:
        for model in found:
            print(f"{short(model)} ...", flush=True)
            shutil.copytree(model, staging / "models" / model.name)
        print("wheels ...", flush=True)
        constraints, more = shipped("constraints.txt"), ["--extra-index-url", index] if index else []
        command = [
            "wheel",
            "--quiet",
            "-w",
            str(staging / "wheels"),
            "-c",
            str(constraints),
            *more,
            f"{source}[lab,serve,export,gguf]",
        ]
        done = subprocess.run([sys.executable, "-m", "pip", *command], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise ChatmagicError(f"pip could not bring the wheels; it said: {said[-1]}")
        write(staging / "constraints.txt", constraints.read_bytes())
        script = Path(__file__).with_name("install.sh").read_text(encoding="utf-8")
        write(staging / "install.sh", script.replace("@VERSION@", "{}.{}".format(*sys.version_info)))
        place(staging, lambda notebook: notebook)
    print(f"{bytes_below(folder) / GB:.1f} GB. On a seat, with no network: sh {short(folder)}/install.sh")


def bytes_below(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
