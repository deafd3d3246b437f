"""What lies in a folder, and a small disk, for the tests that fill one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder and of those in it, by their paths there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """`folder` on a file system of that size ("4m") for the block, where root may mount one; whether it is."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "none", folder]
    mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)
