"""What this machine has and lacks for the course, and the command that mends each: `chatmagic doctor`.

Nothing is loaded for it but what a GPU's driver makes necessary: torch is imported only where there is one.
"""

import configparser
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.request import getproxies

from ..files import nearest_existing
from ..machine import AUTODL, PACKAGES, courses, gpu_memory, home, report, shipped, short
from ..models.checkpoint import CheckpointError, check_whole
from .hubs import HUBS, without_password
from .profile import Profile, get_profile, unfit
from .wanted import find, local

PYTHONS = ((3, 11), (3, 13))  # the first and the last that the course was tried on
PORTS = {8888: "JupyterLab", 6006: "what AutoDL shows outside"}
OK, NOTE, BAD = "ok", "note", "bad"


class Finding(NamedTuple):
    """A thing, what was found of it, whether that is "ok", a "note" or "bad" (the course cannot run), and what to
    type."""

    what: str
    found: str
    state: str = OK
    mend: str = ""


def diagnose(profile: str = "auto") -> list[Finding]:
    """All findings, for the profile of that name. Raises ProfileError for a name that is none."""
    chosen = get_profile(profile)
    found = [_judged(what, text) for what, text in report(home())]
    found += [*_bitsandbytes(), _kernel(), _font(), _index(), *_network(), *_ports(), *_folders()]
    return [*found, _model(chosen), _fit(chosen)]


def _judged(what: str, text: str) -> Finding:
    """A row of `report` with what is to be said of it."""
    if what == "Python" and not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Finding(what, text, BAD, "make PYTHON=python3.12 tutorial, where that one is installed")
    if what == "GPU" and "no CUDA" in text:
        return Finding(
            what, text, NOTE, "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        )
    if what == "GPU" and "too old" in text:
        return Finding(
            what, text, NOTE, "an image with a newer driver, or a torch for an older CUDA: pytorch.org/get-started"
        )
    if what == "GPU" and text.startswith("held by process") and not text.endswith("(this one)"):
        pid = re.findall(r"\d+", text)[0]
        return Finding(what, text, NOTE, f"close its notebook's kernel, or, if it is yours: kill {pid}")
    return Finding(what, text, *_release(what)) if what in PACKAGES else Finding(what, text)


def _release(package: str) -> tuple[str, str]:
    """The state of an installed package, and what to type: against the oldest that may be, and what was tested."""
    install = f"pip install -U {package}"
    try:
        have = version(package)
    except PackageNotFoundError:
        return BAD, install
    floors = {}
    with suppress(PackageNotFoundError):
        floors = dict(
            re.findall(r"^([\w-]+)(?:\[.*?\])?>=([\d.]+)", "\n".join(requires("chatmagic") or ()), re.MULTILINE)
        )
    if package in floors and _numbers(have) < _numbers(floors[package]):
        return BAD, f"pip install -U '{package}>={floors[package]}'"
    tested = re.search(rf"^{package}==(\S+)", shipped("constraints.txt").read_text(), re.MULTILINE)
    if tested and _numbers(have)[:2] != _numbers(tested[1])[:2]:
        return NOTE, f"tested with {tested[1]}; where something is odd: pip install {package}=={tested[1]}"
    return OK, ""


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release.partition("+")[0]))


def _bitsandbytes() -> Iterator[Finding]:
    """Whether it brings a library for the CUDA that torch was built with."""
    spec = find_spec("bitsandbytes")
    if not gpu_memory() or not spec or not spec.origin:
        return
    import torch

    cuda = (torch.version.cuda or "").replace(".", "")
    libraries = Path(spec.origin).parent.glob("libbitsandbytes_cuda*")
    brought = sorted(path.stem.removeprefix("libbitsandbytes_cuda") for path in libraries)
    if any(each[:2] == cuda[:2] for each in brought):  # it takes the nearest of the same major version
        yield Finding("bitsandbytes", f"has a library for CUDA {torch.version.cuda}")
    else:
        said = f"has libraries for CUDA {', '.join(brought) or 'none'}, and torch is built with {torch.version.cuda}"
        yield Finding("bitsandbytes", said, NOTE, "pip install -U bitsandbytes; until then NF4 and int8 do not load")


def _kernel() -> Finding:
    """Whether notebooks find a kernel named chatmagic, and it is of this Python."""
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "jupyter"
    folders = [Path(os.environ.get("JUPYTER_DATA_DIR") or data), Path(sys.prefix) / "share" / "jupyter"]
    specs = (folder / "kernels" / "chatmagic" / "kernel.json" for folder in folders)
    spec = next((file for file in specs if os.path.isfile(file)), None)
    mend = f"{short(sys.executable)} -m ipykernel install --user --name chatmagic (make kernel does that)"
    if spec is None:
        return Finding("kernel", "no kernel named chatmagic is registered: notebooks run in python3's", NOTE, mend)
    of = ""
    with suppress(OSError, ValueError, LookupError, TypeError):
        of = str(json.loads(spec.read_text(encoding="utf-8"))["argv"][0])
    if _python(of) != _python(sys.executable):
        return Finding("kernel", f"{short(spec.parent)} is of another Python than this", NOTE, mend)
    return Finding("kernel", f"chatmagic, {short(spec.parent)}")


def _python(path: str) -> tuple[Path, Path]:
    """The folder of a Python, and what it is a link to: that alone is the same for all environments made of one."""
    return Path(path).parent.resolve(), Path(path).resolve()


def _font() -> Finding:
    """The plots' own letters."""
    font = Path(__file__).parents[1] / "training" / "labels.otf"
    if font.is_file():
        return Finding("fonts", f"the plots bring their own: {font.name}")
    return Finding(
        "fonts",
        "the plots' own is not there: Chinese shows as boxes",
        NOTE,
        "pip install --force-reinstall --no-deps . in the repository's folder",
    )


def _index() -> Finding:
    """Where pip asks, by its variables and files."""
    files = [
        Path(sys.prefix) / "pip.conf",
        Path("~/.config/pip/pip.conf"),
        Path("~/.pip/pip.conf"),
        Path("/etc/pip.conf"),
    ]
    files = [Path(os.environ["PIP_CONFIG_FILE"])] + files if os.environ.get("PIP_CONFIG_FILE") else files
    said = os.environ.get("PIP_INDEX_URL")
    for file in files:
        parser = configparser.RawConfigParser()
        with suppress(OSError, configparser.Error, UnicodeError):
            parser.read(file.expanduser())
        said = said or parser.get("global", "index-url", fallback=None)
    if said:
        return Finding("pip", f"asks {without_password(said)}")
    return Finding("pip", "asks PyPI itself", OK, "where that is slow: pip config set global.index-url URL")


def _network() -> Iterator[Finding]:
    """Where the hubs' clients ask, and through which proxy. Nobody is asked here."""
    yield Finding("hubs", ", ".join(without_password(hub.address()) for hub in HUBS))
    for scheme, proxy in getproxies().items():
        if scheme == "no" or not proxy:
            continue
        socks = proxy.startswith("socks")
        if socks and find_spec("socks") is None:
            said = f"{without_password(proxy)}, and the package for such a proxy is not installed"
            yield Finding(
                f"{scheme}_proxy", said, BAD, f"env -u {scheme}_proxy -u {scheme.upper()}_PROXY pip install pysocks"
            )
        else:
            yield Finding(f"{scheme}_proxy", without_password(proxy))
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("HF_HUB_OFFLINE", "is set: Hugging Face is not asked", NOTE, "unset HF_HUB_OFFLINE")


def _ports() -> Iterator[Finding]:
    """Who else listens where notebooks do."""
    for port, whose in PORTS.items():
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                yield Finding("port", f"{port} ({whose}) is taken", NOTE, f"another: jupyter lab --port {port + 1}")


def _folders() -> Iterator[Finding]:
    """Whether models and courses can be written where they go."""
    for what, folder, name in (("models", home(), "CHATMAGIC_HOME"), ("courses", courses(), "CHATMAGIC_COURSE")):
        found = nearest_existing(folder)
        closed = not os.access(found, os.W_OK | os.X_OK)
        used = what == "models" and folder == found and os.access(folder, os.R_OK)  # a share: what is whole is used
        state = (NOTE if used else BAD) if closed else OK
        said = f"{short(folder)}{' cannot be written' if closed else ''}"
        yield Finding(what, said, state, f"export {name}=FOLDER, one of your own" if closed else "")
    if os.access(AUTODL, os.W_OK | os.X_OK) and not home().is_relative_to(AUTODL):
        yield Finding(
            "data disk", f"models go to {short(home())}, and not to {AUTODL}", NOTE, f"export CHATMAGIC_HOME={AUTODL}"
        )


def _model(profile: Profile) -> Finding:
    """Whether the profile's model is here."""
    wanted = find(profile.name)
    if folder := local(wanted):
        return Finding("model", f"{profile.name} is whole, {short(folder)}")
    if os.path.lexists(wanted.folder):
        try:
            check_whole(wanted.folder)
        except (CheckpointError, OSError) as error:
            return Finding("model", str(error), NOTE, f"chatmagic download {profile.name}")
    return Finding("model", f"{profile.name} is not here yet", OK, f"chatmagic download {profile.name}")


def _fit(profile: Profile) -> Finding:
    """Whether every step of the course, merging included, fits this machine with the profile."""
    if problems := unfit(profile):
        said = f"{profile.name} needs {'; it needs '.join(problems)}"
        return Finding("profile", said, BAD, "" if profile == get_profile() else "chatmagic doctor --profile auto")
    return Finding("profile", f"{profile.name}: fits this machine")
