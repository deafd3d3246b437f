"""A dozen of the seeded schedules that tests/helpers/schedules.py plays 300 of."""

import pytest

import schedules


@pytest.mark.parametrize("seed", range(12))
def test_a_run_that_things_befall_is_the_run_that_nothing_befell(tmp_path, seed):
    assert schedules.play(seed, tmp_path / "run")
