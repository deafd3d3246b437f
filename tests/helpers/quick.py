"""Cases of which the quick suite takes the first few: together they would take it too long."""

from collections.abc import Iterable

import pytest


def first(few: int, cases: Iterable) -> list:
    """The cases for `parametrize`, all but the first `few` marked slow."""
    cases = list(cases)
    slow = [pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.slow) for each in cases]
    return [*cases[:few], *slow[few:]]
