"""A small disk, for the tests that fill one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
