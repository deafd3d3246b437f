"""JupyterLab on this machine, for a headless Chromium."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

TESTS = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def jupyterlab(folder, settings, **environment):
    """Its address, serving `folder`, with what it keeps below `settings`; kernels have `environment` too."""
    (settings / "labconfig").mkdir()
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (settings / "labconfig" / "page_config.json").write_text(json.dumps(quiet))
    port = free_port()
    options = {
        "ServerApp.root_dir": folder,
        "ServerApp.port": port,
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True,
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.port_retries=0",
    ]
    own = {
        "PYTHONPATH": os.pathsep.join([str(TESTS / "helpers"), str(TESTS.parent)]),
        "JUPYTER_CONFIG_DIR": str(settings),
        "IPYTHONDIR": str(settings / "ipython"),
        "CHATMAGIC_COURSE": str(settings / "course"),
    }
    environment = os.environ | own | environment
    with open(settings / "lab.log", "w") as log:
        server = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        wait(lambda: answers(f"http://127.0.0.1:{port}/api"), 120, lambda: (settings / "lab.log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def answers(url):
    try:
        return urlopen(url, timeout=1).status == 200
    except (URLError, OSError):
        return False


def wait(condition, seconds, explain=lambda: ""):
    """What `condition` comes to be, within `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, explain()
        time.sleep(0.02)
    return value
