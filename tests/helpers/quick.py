"""Cases of which the quick suite takes the first few: together they would take it too long."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest


def first(few: int, cases: Iterable, of: Callable[[Any], Hashable] = lambda case: None) -> list:
    """The cases for `parametrize`, all but the first `few` of each kind, which `of` tells, marked slow."""
    marked, seen = [], Counter()
    for each in cases:
        seen[kind := of(each)] += 1
        slow = pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.slow)
        marked.append(each if seen[kind] <= few else slow)
    return marked
