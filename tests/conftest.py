"""Fixtures that several test files share: the golden data beside the checkout, and the embedded model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden data. Absent elsewhere: skipped there, but a failure where CI demands it."""
    if not (SHARED / "vectors").is_dir():
        reason = f"golden data not found at {SHARED}"
        (pytest.fail if os.environ.get("CHATMAGIC_REQUIRE_SHARED") else pytest.skip)(reason)
    return SHARED


@pytest.fixture(scope="session")
def tiny_models(shared, tmp_path_factory) -> Path:
    """A folder with one tiny checkpoint a family, in its publisher's layout (see `shared/models`)."""
    out = tmp_path_factory.mktemp("tiny")
    subprocess.run([sys.executable, shared / "models" / "build.py", out], check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The folder of the embedded model, SmolLM2-135M-Instruct."""
    from chatmagic import snapshot_download

    return snapshot_download("smollm2-135m")
