"""The notebooks executed, each in a kernel of its own, from the first that is not done; and how far they are."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from traitlets.config import Config

from ..errors import ChatmagicError
from ..files import make_folder, remove, write
from ..machine import shipped
from ..progress import MARK
from ..text import fit, width
from .comparison import before_after
from .thread import resume, started


def execute_all(folder: Path, executed: Path, in_place: bool = False) -> None:
    """Execute the notebooks in the folder in order, each in a fresh kernel, from the first that failed or was changed;
    when none is left, or another course was started since, all of them again. Copies go into `executed`, and with
    in_place the outputs into the notebooks as well. Raises ChatmagicError where there are none, where `executed` holds
    what is not this function's own, and for a cell that fails."""
    notebooks = sorted(folder.glob("0*.ipynb"))
    if not notebooks:
        raise ChatmagicError(
            f"There are no notebooks in {folder}. Run this from the repository's folder, or have them put into a "
            "folder of yours and run there: the same command and FOLDER"
        )
    first = _first_to_run(notebooks, executed)
    make_folder(executed)
    for path in notebooks[first:]:  # before the first runs: if broken off, no stale copy of a later one counts as done
        for copy in _copies(path, executed):
            remove(copy)
    # Nobody sits there to answer whether a broken-off training is to go on: it goes on.
    environment = {"CHATMAGIC_RESUME": "1"} | os.environ
    began = time.monotonic()
    for number, path in enumerate(notebooks):
        label = f"[{number + 1}/{len(notebooks)}] {path.stem:20}"
        if number < first:
            print(label, "done before", flush=True)
            continue
        print(label, end=" ", flush=True)
        start, (copy, failed) = time.monotonic(), _copies(path, executed)
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.pop("chatmagic", None)  # the seal, where an executed copy was put back as the notebook
        try:
            execute(notebook, path.parent, environment, partial(_say, label) if sys.stdout.isatty() else None)
        except CellExecutionError as error:
            write(failed, nbformat.writes(_sealed(notebook)) + "\n")
            raise ChatmagicError(
                f"{path.name} failed: {error.ename}: {error.evalue}\nThe executed part is {failed}. Mend the cause, "
                "then run the same command: it goes on from this notebook."
            ) from None
        except (AssertionError, DeadKernelError):  # the first where nbclient, on Ctrl-C, ends the kernel under itself
            raise ChatmagicError(
                f"The kernel of {path.name} ended before its notebook: by Ctrl-C, or killed for want of memory. The "
                "same command goes on from this notebook."
            ) from None
        if in_place:
            write(path, nbformat.writes(notebook) + "\n")
        write(copy, nbformat.writes(_sealed(notebook)) + "\n")  # last: it says that the notebook is done
        if sys.stdout.isatty():
            _say(label, "")
            print(f"\r{label}", end=" ")
        print(f"{time.monotonic() - start:6.0f} s", flush=True)
    print(f"{len(notebooks)} notebooks in {time.monotonic() - began:.0f} s; executed copies in {executed}\n")
    _print_replies()


def execute(
    notebook: NotebookNode, folder: Path, environment: dict[str, str], say: Callable[[str], object] | None = None
) -> None:
    """Execute all cells, in `folder`; their outputs go into the notebook. `say` hears which cell runs, and what its
    bars say. Raises nbclient's errors for a cell that fails and a kernel that ends."""
    with tempfile.TemporaryDirectory() as sockets:  # over TCP anybody on a shared machine reaches the kernel
        client = Watched(
            notebook,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            config=Config(AsyncKernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),
            coalesce_streams=True,
            record_timing=False,
        )
        client.say = say
        client.execute(env=environment)


class Watched(NotebookClient):  # type: ignore[misc]  # which brings no types
    """nbclient's, that tells what it does."""

    say: Callable[[str], object] | None = None

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """nbclient's own name for taking one message of the kernel's."""
        if self.say:
            content = msg["content"]
            bar = content["data"]["text/plain"] if content.get("metadata") == MARK else ""
            self.say(f"cell {cell_index + 1} of {len(self.nb.cells)}  {bar}")
        return super().process_message(msg, cell, cell_index)


def in_language(folder: Path, language: str) -> Path:
    """Where what is in that language lies in a folder: Chinese at its top, another language in a folder of its own."""
    return folder if language == "zh" else folder / language


def place_notebooks(folder: Path, language: str) -> None:
    """Put the course's notebooks in that language into the folder, each where none of its name is: those that are there
    are the reader's, and stay."""
    target = in_language(folder, language)
    make_folder(target)
    for notebook in sorted(in_language(shipped("notebooks"), language).glob("0*.ipynb")):
        if not (target / notebook.name).exists():
            write(target / notebook.name, notebook.read_bytes())


def _say(label: str, text: str) -> None:
    """Write how far a notebook is over the terminal's line."""
    print(f"\r{label} {fit(text, max(0, get_terminal_size().columns - width(label) - 2))}", end="", flush=True)


def _copies(path: Path, executed: Path) -> tuple[Path, Path]:
    """Where the executed notebook goes, and where its executed part does if it fails."""
    return executed / path.name, executed / f"{path.stem}.failed.ipynb"


def _first_to_run(notebooks: list[Path], executed: Path) -> int:
    """The index of the first notebook without an executed copy of just its cells. Raises ChatmagicError if a file that
    is not this command's own stands where it would write."""
    foreign = [
        copy.name
        for path in notebooks
        for copy in _copies(path, executed)
        if os.path.lexists(copy) and (copy.is_symlink() or copy.samefile(path) or not _read_sealed(copy))
    ]
    if foreign:
        raise ChatmagicError(
            f"{executed} holds what this command did not write, or what was changed since: {', '.join(foreign)}. "
            "Nothing was executed, and all of it is left alone. Choose another folder: the same command with "
            "--executed OTHER, or move these files away."
        )

    def done(path: Path) -> bool:
        copy = _read_sealed(executed / path.name)
        return copy is not None and _cells(copy) == _cells(nbformat.read(path, as_version=4))

    first = next((index for index, path in enumerate(notebooks) if not done(path)), 0)  # all done: a new run
    last = _read_sealed(executed / notebooks[first - 1].name) if first else None
    return first if last and last["metadata"]["chatmagic"].get("course") == _started() else 0


def _cells(notebook: dict[str, Any]) -> list[tuple[str, str]]:
    """What makes a notebook run again when it changes."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def _sealed(notebook: NotebookNode) -> NotebookNode:
    """The notebook, marked as written by this command, in the course that is started: with a digest that no longer
    holds once anybody changes it."""
    notebook.metadata["chatmagic"] = {"sha256": _digest_of(json.loads(nbformat.writes(notebook))), "course": _started()}
    return notebook


def _started() -> str | None:
    """A digest of which course that is; None without one."""
    return sha256(started().read_bytes()).hexdigest() if started().is_file() else None


def _read_sealed(path: Path) -> dict[str, Any] | None:
    """The notebook's JSON, if this command wrote it and nobody changed it since."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return notebook if notebook["metadata"]["chatmagic"]["sha256"] == _digest_of(notebook) else None
    except (OSError, ValueError, LookupError, TypeError):  # no file, no JSON, no notebook, no seal
        return None


def _digest_of(notebook: dict[str, Any]) -> str:
    metadata = {key: value for key, value in notebook["metadata"].items() if key != "chatmagic"}
    return sha256(json.dumps(notebook | {"metadata": metadata}, sort_keys=True).encode()).hexdigest()


def _print_replies() -> None:
    course = resume("before", "merged")
    before, after = (
        json.loads((course.folder / name).read_text(encoding="utf-8")) for name in ("before.json", "after.json")
    )
    print(before_after(before, after))
