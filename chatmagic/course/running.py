"""A notebook executed in a kernel of its own, and how far it is."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

from ..progress import MARK


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


class Watched(NotebookClient):
    """nbclient's, that tells what it does."""

    say: Callable[[str], object] | None = None

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """nbclient's own name for taking one message of the kernel's."""
        if self.say:
            content = msg["content"]
            bar = content["data"]["text/plain"] if content.get("metadata") == MARK else ""
            self.say(f"cell {cell_index + 1} of {len(self.nb.cells)}  {bar}")
        return super().process_message(msg, cell, cell_index)
