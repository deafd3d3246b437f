"""A dozen of the seeded schedules that tests/helpers/schedules.py plays 300 of."""

import subprocess
import sys

import pytest

import schedules


@pytest.mark.slow
def test_a_run_that_things_befall_is_the_run_that_nothing_befell():
    """In a process that has made no threads yet: each schedule forks several times."""
    done = subprocess.run([sys.executable, schedules.__file__, "12"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
