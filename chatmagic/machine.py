"""What this machine has: GPU and who holds its memory, RAM, disk, versions, and the kernel that a notebook runs in."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .files import nearest_existing

GB = 10**9
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "torchkeras", "modelscope", "ipython")
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of version 2, of version 1
AUTODL = Path("/root/autodl-tmp")


def home() -> Path:
    """Where models go: CHATMAGIC_HOME if set, else AutoDL's data disk, else the user's cache folder."""
    if named := os.environ.get("CHATMAGIC_HOME"):
        return Path(named).expanduser().resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chatmagic"
    return AUTODL if os.access(AUTODL, os.W_OK | os.X_OK) else cache  # Path.is_dir raises where /root is closed


def courses() -> Path:
    """Where a person's courses go: CHATMAGIC_COURSE if set, else below `home()`. But where CHATMAGIC_HOME names that,
    others may have their models there too: then the user's data folder."""
    if named := os.environ.get("CHATMAGIC_COURSE"):
        return Path(named).expanduser().resolve()
    if os.environ.get("CHATMAGIC_HOME"):
        return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "chatmagic" / "course"
    return home() / "course"


def share_cores() -> None:
    """To be called before torch is imported: lets the threads of OpenMP sleep while they wait for each other.

    They spin, by default, and beside other busy processes take the cores from those that have work.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def shipped(name: str) -> Path:
    """A file or folder of the repository's that the wheel brings as well."""
    here = Path(__file__).with_name(name)
    return here if here.exists() else Path(__file__).parents[1] / name


def has_driver() -> bool:
    """Whether this system has the library of a GPU's driver. Where it has none, torch need not be asked: importing it
    takes seconds."""
    for library in ("libcuda.so.1", "libamdhip64.so", "nvcuda.dll"):
        with suppress(OSError):
            ctypes.CDLL(library)
            return True
    return False


def gpu_memory() -> int:
    """Bytes of memory of the first CUDA device, 0 without one."""
    if "torch" not in sys.modules and not has_driver():
        return 0
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def ram() -> int:
    """Bytes of RAM of this machine, or of its container where that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for limit in map(Path, CGROUPS):
        text = limit.read_text().strip() if limit.is_file() else "max"
        total = min(total, int(text)) if text.isdigit() else total
    return total


def room(needed: int) -> str:
    """How to name another disk for models, and a folder of this machine's whose disk has `needed` bytes free."""
    places = [AUTODL, Path("~/.cache").expanduser(), Path.cwd()]
    mounts = Path("/proc/self/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        device, point, *_ = line.split(" ")
        if device.startswith("/dev/") or ":" in device:  # no folder of the system's own
            places.append(Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point)))
    free = {}
    for place in places:
        with suppress(OSError):
            if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
                free[place] = shutil.disk_usage(place).free
    best = max(free, key=lambda place: free[place], default=None)
    found = best and free[best] >= needed and f": {free[best] / GB:.0f} GB are free at {short(best)}"
    return f"CHATMAGIC_HOME names another disk{found or ''}"


def short(path: Path | str) -> str:
    """The path as a notebook shows it: from the working folder or the home folder where it lies below one."""
    path = Path(path)
    near = os.path.relpath(path)
    return from_home(path) if near.startswith(os.path.join("..", "..")) else near


def from_home(path: Path) -> str:
    """The path, from `~` where it lies below the home folder."""
    return str(Path("~", path.relative_to(Path.home()))) if path.is_relative_to(Path.home()) else str(path)


def report(folder: Path) -> list[tuple[str, str]]:
    """(what, found) rows; `folder` is where models go, on the disk that counts."""
    disk = shutil.disk_usage(nearest_existing(folder))
    rows = [
        ("Python", f"{platform.python_version()}, {short(sys.executable)}"),
        ("CPU", f"{os.cpu_count()} cores, {platform.machine()}"),
        ("RAM", _ram()),
        ("disk", f"{disk.free / GB:.0f} GB free of {disk.total / GB:.0f} at {short(folder)}"),
    ]
    rows += [("GPU", gpu) for gpu in _gpus()] or [("GPU", "none: the course runs on the CPU")]
    return rows + [(package, package_version(package)) for package in PACKAGES]


def _ram() -> str:
    import psutil

    machine = psutil.virtual_memory()
    whole = f" (this container's; the machine has {machine.total / GB:.1f})" if ram() < machine.total else ""
    return f"{ram() / GB:.1f} GB{whole}, {min(machine.available, ram()) / GB:.1f} free"


def _gpus() -> list[str]:
    """One line a GPU, then one a process that holds memory of one, as nvidia-smi tells."""
    if not has_driver():
        return []
    import torch

    if not torch.cuda.is_available():
        lacks = "this torch has no CUDA" if torch.version.cuda is None else "it is too old for this torch's CUDA"
        return [f"found by the driver, but {lacks}"] if _nvidia_smi("gpu", "name") else []
    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        lines.append(f"{torch.cuda.get_device_name(index)}, {free / GB:.1f} GB free of {total / GB:.1f}")
    held = _nvidia_smi("compute-apps", "pid,process_name,used_memory")
    mine = str(os.getpid())
    return lines + [f"held by process {row}" + (" (this one)" if row.split(",")[0] == mine else "") for row in held]


def _nvidia_smi(what: str, fields: str) -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()


def package_version(package: str) -> str:
    """The version of an installed package, or what to type where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return f"missing: pip install {package}"
