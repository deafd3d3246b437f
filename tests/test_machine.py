"""OpenMP's threads sleep while they wait: set before torch is imported, wherever torch is used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quick import first

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").rglob("0[2-9]*.ipynb"))


def openmp_says(code: str, **environment) -> str:
    """What libgomp prints of its settings when torch loads it, in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = clean | {"OMP_DISPLAY_ENV": "true"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "from chatmagic.machine import share_cores; share_cores(); import torch",
        pytest.param("import chatmagic.training", marks=pytest.mark.slow),
        pytest.param("from chatmagic.cli import main; main(['merge', 'no', 'such', 'folder'])", marks=pytest.mark.slow),
    ],
)
def test_the_policy_that_openmp_reads(tmp_path, code):
    said = openmp_says(code, CHATMAGIC_HOME=str(tmp_path))
    assert said.count("OMP_WAIT_POLICY = 'PASSIVE'") == said.count("OMP_WAIT_POLICY =") >= 1


@pytest.mark.slow
def test_what_the_user_has_set_stays():
    code = "from chatmagic.machine import share_cores; share_cores(); import torch"
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in openmp_says(code, OMP_WAIT_POLICY="ACTIVE")


@pytest.mark.parametrize(
    "path", first(2, NOTEBOOKS, of=lambda path: path.parent.name), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_the_first_cell_of_each_notebook_sets_it(path):
    """Run as far as the call: no torch is there by then, whatever the kernel has set."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    before, call, _ = first.partition("\nshare_cores()")
    assert call
    code = f"import os, sys\n{before}share_cores()\nassert 'torch' not in sys.modules\n"
    code += "print(os.environ['OMP_WAIT_POLICY'])"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.stdout == "PASSIVE\n", done.stderr
